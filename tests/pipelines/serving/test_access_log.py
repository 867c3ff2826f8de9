"""The line that a request leaves behind: its ids, its numbers, its end; and no text of anybody's."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import Access, build_api

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SECRET = "Go on"
BODY = {"model": "tiny", "prompt": SECRET, "max_tokens": 4, "temperature": 0}

Ask = Callable[..., tuple[httpx.Response, dict[str, Any] | None]]


@pytest.fixture
def ask(denoiser: Denoiser, backend: Callable[..., Any], access_lines: list[dict[str, Any]]) -> Ask:
    """ask(method, path, body, headers, **access) → the answer, and the line of the log."""

    def ask(
        method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **access: Any
    ) -> tuple[httpx.Response, dict[str, Any] | None]:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(build_api(backend(denoiser), "tiny", access=Access(**access)))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, json=body, headers=headers)

        access_lines.clear()
        answer = asyncio.run(send())
        assert len(access_lines) <= 1
        return answer, access_lines[0] if access_lines else None

    return ask


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_leaves_its_numbers_and_no_text(ask: Ask, stream: bool) -> None:
    answer, line = ask("POST", "/v1/completions", BODY | {"stream": stream})
    assert line is not None
    if not stream:
        usage = answer.json()["usage"]
        assert {name: line[name] for name in ("prompt_tokens", "completion_tokens")} == {
            name: usage[name] for name in ("prompt_tokens", "completion_tokens")
        }
    assert (line["status"], line["stream"], line["choices"], line["forwards"]) == (200, stream, 1, 4)
    assert (line["method"], line["path"], line["client"]) == ("POST", "/v1/completions", "127.0.0.1")
    assert 0 < line["first_text_s"] <= line["seconds"]
    assert SECRET not in json.dumps(line)
    assert answer.headers["x-request-id"] == line["request_id"]


def test_prompts_are_written_down_for_those_who_ask_for_it(ask: Ask) -> None:
    _, line = ask("POST", "/v1/completions", BODY | {"suffix": "!"}, logs_prompts=True)
    assert line is not None
    assert (line["prompt"], line["suffix"]) == ([SECRET], "!")
    talk = [{"role": "user", "content": SECRET}]
    _, line = ask("POST", "/v1/chat/completions", {"messages": talk}, logs_prompts=True)
    assert line is not None
    assert [turn["content"] for turn in line["messages"]] == [SECRET]
    _, line = ask("POST", "/v1/responses", {"input": "x", "instructions": SECRET}, logs_prompts=True)
    assert line is not None
    assert line["instructions"] == SECRET
    _, line = ask("POST", "/tokenize", {"messages": talk}, logs_prompts=True)
    assert line is not None
    assert [turn["content"] for turn in line["messages"]] == [SECRET]


def test_the_ids_are_the_clients_where_it_has_some(ask: Ask) -> None:
    answer, line = ask("GET", "/v1/models", headers={"X-Request-ID": "mine", "traceparent": TRACE})
    assert line is not None
    assert (line["request_id"], line["trace_id"]) == ("mine", TRACE.split("-")[1])
    assert answer.headers["x-request-id"] == "mine"
    _, line = ask("GET", "/v1/models", headers={"x-request-id": "x" * 5000})
    assert line is not None
    assert len(line["request_id"]) <= 128
    answer, line = ask("GET", "/v1/models", echoes_id=False)  # Ray's proxy does it
    assert line is not None
    assert line["request_id"]
    assert "x-request-id" not in answer.headers


@pytest.mark.parametrize(
    "bad",
    [
        TRACE.upper(),
        TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        TRACE.replace("00f067aa0ba902b7", "0" * 16),
        f"ff{TRACE[2:]}",
        TRACE[:-1],
        "",
    ],
)
def test_what_is_no_trace_is_no_trace(ask: Ask, bad: str) -> None:
    _, line = ask("GET", "/v1/models", headers={"traceparent": bad})
    assert line is not None
    assert "trace_id" not in line


def test_refusals_and_failures_are_lines_too_and_quiet_ones_are_none(ask: Ask) -> None:
    for method, path, body, status in [
        ("POST", "/v1/completions", BODY | {"model": "other"}, 404),
        ("POST", "/v1/completions", BODY | {"max_token": 4}, 400),
        ("GET", "/nowhere", None, 404),
    ]:
        _, line = ask(method, path, body)
        assert line is not None
        assert line["status"] == status
    for path in ("/health", "/metrics"):
        assert ask("GET", path)[1] is None


def test_the_replica_names_the_request_that_it_failed(
    ask: Ask, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(denoiser.engine, "batches", broken)
    headers = {"x-request-id": "r-7", "traceparent": TRACE}
    answer, line = ask("POST", "/v1/completions", BODY, headers)
    assert line is not None
    assert (answer.status_code, line["status"]) == (500, 500)
    assert f"request r-7 (trace {TRACE.split('-')[1]}) has failed: out of memory" in caplog.text


def test_the_lines_go_to_standard_output_as_they_are() -> None:
    code = (
        "from pipelines.serving.access_log import access_log, write_to_stdout\n"
        "write_to_stdout(), write_to_stdout(), access_log.info('{}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{}\n", "")
