"""Who may ask, and how much: good and bad keys over the application, files of keys, and the arithmetic of a minute."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from llada.errors import UserError
from pipelines.serving.errors import RequestError
from pipelines.serving.keys import Account, Bucket, KeyLimits, load_keys
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import Access, build_api

GOOD, OTHER = "sk-good-key", "sk-other-key"
BODY = {"prompt": "Go", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def ask(denoiser: Denoiser, backend: Callable[..., Any]) -> Callable[..., httpx.Response]:
    """ask(method, path, headers) at one endpoint with two keys, whose limits are `ask.limits`."""

    def application(**access: Any) -> Callable[..., httpx.Response]:
        api = build_api(backend(denoiser), "tiny", access=Access(keys=(GOOD, OTHER), **access))

        def ask(method: str, path: str, key: str | None = None, **headers: str) -> httpx.Response:
            async def send() -> httpx.Response:
                given = headers if key is None else {"Authorization": f"Bearer {key}", **headers}
                async with httpx.AsyncClient(
                    transport=httpx.ASGITransport(api), base_url="http://test"
                ) as client:
                    return await client.request(
                        method, path, json=BODY if method == "POST" else None, headers=given
                    )

            return asyncio.run(send())

        return ask

    return application


def test_without_a_good_key_nothing_is_answered_but_what_strangers_may_see(ask: Any) -> None:
    at = ask()
    for path in ("/", "/health", "/metrics", "/health/"):
        assert at("GET", path).status_code == 200
    for key in (None, "", "sk-good-ke", GOOD + "x", "x" * 9000):
        for method, path in (
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/"),
            ("GET", "/nowhere"),
        ):
            refused = at(method, path, key)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer"), (key, path)
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    for key in (GOOD, OTHER):
        assert at("POST", "/v1/completions", key).status_code == 200
        assert at("GET", "/v1/models", key).status_code == 200
    assert at("GET", "/v1/models", authorization=f"bearer  {GOOD} ").status_code == 200
    assert at("GET", "/v1/models", authorization=f"Basic {GOOD}").status_code == 401


def test_each_key_has_requests_of_its_own(ask: Any) -> None:
    at = ask(key_limits=KeyLimits(requests_per_minute=2))
    assert [at("POST", "/v1/completions", GOOD).status_code for _ in range(3)] == [200, 200, 429]
    refused = at("POST", "/v1/completions", GOOD)
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    at("POST", "/v1/completions", "wrong")
    at("GET", "/v1/models/of/nobody")
    at("GET", "/nowhere", GOOD)
    at("GET", "/v1/models/nobody", GOOD)
    at("GET", "/v1/completions", GOOD)
    counted = re.findall(
        r'llada_requests_total\{route="(.+)",status="(\d+)"\} (\S+)', at("GET", "/metrics").text
    )
    assert sorted(counted) == [
        ("/v1/completions", "200", "2.0"),
        ("/v1/completions", "401", "1.0"),
        ("/v1/completions", "405", "1.0"),
        ("/v1/completions", "429", "2.0"),
        ("other", "401", "1.0"),
        ("other", "404", "2.0"),  # whatever strangers ask for is one line
    ]
    assert "2 requests per minute" in error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert at("GET", "/v1/models", GOOD).status_code == 200  # reading costs nothing
    assert at("POST", "/v1/completions", OTHER).status_code == 200


def test_each_key_has_tokens_of_its_own(ask: Any) -> None:
    at = ask(key_limits=KeyLimits(tokens_per_minute=6))
    used = 0
    while (answer := at("POST", "/v1/completions", GOOD)).status_code == 200:
        used += answer.json()["usage"]["total_tokens"]
    assert used >= 6
    assert "6 tokens per minute" in answer.json()["error"]["message"]
    assert at("POST", "/v1/completions", OTHER).status_code == 200


def test_browsers_of_other_sites_are_let_in_by_name_alone(ask: Any) -> None:
    site, method = "https://chat.example.org", {"access-control-request-method": "POST"}
    shut = ask()("OPTIONS", "/v1/completions", origin=site, **method)
    assert "access-control-allow-origin" not in shut.headers
    at = ask(cors_origins=(site,))
    assert (
        at("OPTIONS", "/v1/completions", origin=site, **method).headers["access-control-allow-origin"] == site
    )
    stranger = at("OPTIONS", "/v1/completions", origin="https://x.org", **method)
    assert "access-control-allow-origin" not in stranger.headers
    assert (stranger.status_code, "Origin" in stranger.headers["vary"]) == (400, True)
    assert stranger.json()["error"]["message"] == "Disallowed CORS origin"
    assert 'llada_requests_total{route="other",status="400"} 1.0' in at("GET", "/metrics").text
    answer = at("POST", "/v1/completions", GOOD, origin=site)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, site)
    refused = at("POST", "/v1/completions", origin=site)  # its page must be able to read why
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, site)


def test_a_minute_fills_a_bucket_and_a_debt_is_waited_for() -> None:
    now = 0.0
    bucket = Bucket(60, lambda: now)
    assert bucket.wait_s(60) == 0
    bucket.take(90)
    assert (bucket.wait_s(), bucket.wait_s(1)) == (30, 31)
    now = 30.0
    assert (bucket.wait_s(), bucket.wait_s(1)) == (0, 1)
    now = 1000.0
    bucket.take(0)
    assert bucket.wait_s(60) == 0
    bucket.take(60)
    assert bucket.wait_s(1) == 1  # no more than a minute's is saved up
    slow = Bucket(0.5, lambda: now)  # one in two minutes: the first at once
    assert slow.wait_s(1) == 0


def test_what_is_waited_for_longest_is_named() -> None:
    now = 0.0
    account = Account("k", KeyLimits(requests_per_minute=1, tokens_per_minute=60), lambda: now)
    account.admit()
    account.charge(180)
    with pytest.raises(RequestError, match="60 tokens per minute") as caught:
        account.admit()
    assert (caught.value.status, caught.value.retry_after_s) == (429, 120)


def test_keys_are_lines_of_a_file_or_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{GOOD}\n\n  {OTHER}\r\n")
    monkeypatch.setenv("TOY_KEYS", f"{GOOD}\n{OTHER}")
    assert load_keys(str(file)) == load_keys("env:TOY_KEYS") == [GOOD, OTHER]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n", "holds no API key"),
        ("good-key\nshort\n", "line 2: a key has at least 8 characters"),
        ("good-key\nwith a space\n", "line 2: a key has"),
        ("Schlüssel-7", "line 1: a key has"),
        ("good-key\n\ngood-key\n", "line 3: the key of line 1 again"),
    ],
)
def test_a_bad_file_of_keys_is_named_by_its_line_and_shows_no_key(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{file}") + ".*" + message) as caught:
        load_keys(str(file))
    assert "good-key" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_must_be_keys_where_they_are_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no environment variable 'NO_SUCH'"):
        load_keys("env:NO_SUCH")
    with pytest.raises(UserError, match="cannot read the file of API keys"):
        load_keys(str(tmp_path / "none"))
