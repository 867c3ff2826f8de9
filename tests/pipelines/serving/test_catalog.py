"""Which replicas a request goes to, over the application with a real model behind each name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest

from llada.sampling.events import Started
from pipelines.serving.access_log import RequestIds
from pipelines.serving.backend import Health
from pipelines.serving.catalog import Catalog, Model
from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.dialects.completions import CompletionBody
from pipelines.serving.errors import RequestError
from pipelines.serving.events import ReplicaEvent, Serving
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import build_api

FAST = {"prompt": "Go", "max_tokens": 2, "temperature": 0}


class Counting:
    """A model in this process that counts its requests."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.requests, self.state = denoiser, 0, Health("ok")

    async def stream(self, body: SamplingBody, ids: RequestIds) -> AsyncGenerator[ReplicaEvent, None]:
        self.requests += 1
        async for event in self.denoiser.stream(body, ids):
            yield event

    def health(self) -> Health:
        return self.state


@pytest.fixture
def backends(denoiser: Denoiser) -> list[Counting]:
    return [Counting(denoiser) for _ in range(3)]


def ask(catalog: Catalog, path: str, body: Any = None, more: tuple[str, ...] = ("b",)) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(build_api(catalog, "a", more_models={name: {} for name in more}))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request("POST" if body else "GET", path, json=body)

    return asyncio.run(send())


def test_a_request_goes_where_its_model_is(backends: list[Counting]) -> None:
    a, b, _ = backends
    catalog = Catalog({"a": Model(a), "b": Model(b)})
    for model, expected in [("a", (1, 0)), ("b", (1, 1)), (None, (2, 1))]:
        answer = ask(catalog, "/v1/completions", FAST | ({"model": model} if model else {}))
        assert (answer.status_code, answer.json()["model"]) == (200, model or "a")
        assert (a.requests, b.requests) == expected
    unknown = ask(catalog, "/v1/completions", FAST | {"model": "c"})
    assert unknown.status_code == 404
    assert "this endpoint serves 'a' and 'b'" in unknown.json()["error"]["message"]
    listed = ask(catalog, "/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["a", "b"]
    card = ask(catalog, "/v1/models/b").json()
    assert card == listed[1] | {"created": card["created"]}  # of each application its own second
    assert ask(catalog, "/v1/models/c").status_code == 404


def test_the_endpoint_is_as_well_as_its_models_are(backends: list[Counting]) -> None:
    a, b, canary = backends
    catalog = Catalog({"a": Model(a, canary, 0.5), "b": Model(b)})
    canary.state = Health("unavailable", "no replica")
    assert catalog.health() == Health("ok")
    b.state = Health("starting", "no replica of the model has started yet")
    assert catalog.health() == Health("starting", "b: no replica of the model has started yet")
    assert Catalog({"b": Model(b)}).health() == b.state


def test_a_canary_gets_its_share_by_the_id_and_none_while_it_does_not_answer(
    backends: list[Counting],
) -> None:
    stable, canary, _ = backends
    model = Model(stable, canary, 0.05)
    ids = [RequestIds(f"request-{i}") for i in range(20_000)]
    chosen = [model.choose(one) for one in ids]
    assert chosen.count(canary) == pytest.approx(1000, abs=150)
    assert chosen == [model.choose(one) for one in ids]
    canary.state = Health("unavailable", "no replica")
    assert {model.choose(one) for one in ids} == {stable}
    assert Model(stable).choose(ids[0]) is stable


@pytest.mark.parametrize("status", [429, 503, 400])
@pytest.mark.parametrize("seen", [0, 1, 2])
def test_a_canarys_trouble_is_not_the_users(backends: list[Counting], status: int, seen: int) -> None:
    """Nor when it comes late, as long as nothing was sent; what is wrong with the request itself is so with both."""
    stable, _, _ = backends

    class Troubled(Counting):
        async def stream(self, body: SamplingBody, ids: RequestIds) -> AsyncGenerator[ReplicaEvent, None]:
            for event in (Serving("f", None, "two"), Started(0, 1))[:seen]:
                yield event
            raise RequestError(status, "trouble")

    catalog = Catalog({"a": Model(stable, Troubled(stable.denoiser), 1.0)})
    expected = ask(Catalog({"a": Model(stable)}), "/v1/completions", FAST | {"seed": 0}, more=())
    before = stable.requests
    for streams in (False, True):
        answer = ask(catalog, "/v1/completions", FAST | {"seed": 0, "stream": streams}, more=())
        if status == 400:
            assert answer.status_code in (400, 200)  # 200: of a stream that had begun, which tells of it
            assert "trouble" in answer.text
        else:
            assert answer.status_code == 200
            assert "trouble" not in answer.text
            if not streams:
                assert answer.json()["choices"] == expected.json()["choices"]
    assert stable.requests - before == (0 if status == 400 else 2)


@pytest.mark.parametrize("seen", [0, 2])
def test_what_a_canary_could_not_answer_counts_as_its_own(backends: list[Counting], seen: int) -> None:
    """Else one that fails with each request would look like one that gets none."""
    stable, _, _ = backends

    class Lost(Counting):
        async def stream(self, body: SamplingBody, ids: RequestIds) -> AsyncGenerator[ReplicaEvent, None]:
            for event in (Serving("f", None, "two"), Started(0, 1))[:seen]:
                yield event
            raise RequestError(503, "trouble")

    catalog = Catalog({"a": Model(stable, Lost(stable.denoiser), 1.0, "two")})

    async def send() -> str:
        transport = httpx.ASGITransport(build_api(catalog, "a"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for path, body in [("/v1/completions", FAST), ("/v1/completions", FAST | {"stream": True})]:
                assert (await client.post(path, json=body)).status_code == 200
            assert (await client.post("/tokenize", json={"prompt": "Go"})).status_code == 200
            return (await client.get("/metrics")).text

    stable.denoiser.version = "one"
    try:
        lines = asyncio.run(send()).splitlines()
    finally:
        stable.denoiser.version = ""
    assert sorted(line for line in lines if line.startswith("llada_version_requests_total{")) == [
        'llada_version_requests_total{model="a",status="200",version="one"} 2.0',
        'llada_version_requests_total{model="a",status="503",version="two"} 2.0',
    ]


def test_both_versions_are_in_the_metrics(backends: list[Counting], call: Callable[..., Any]) -> None:
    stable, canary, _ = backends
    stable.denoiser.version = "one"
    catalog = Catalog({"a": Model(stable, canary, 1.0)})

    async def send() -> str:
        transport = httpx.ASGITransport(build_api(catalog, "a"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post("/v1/completions", json=FAST)
            canary.state = Health("starting")
            stable.denoiser.version = "two"
            for _ in range(2):
                await client.post("/v1/completions", json=FAST)
            await client.post("/v1/completions", json=FAST | {"n": 100})
            return (await client.get("/metrics")).text

    try:
        text = asyncio.run(send())
    finally:
        stable.denoiser.version = ""
    assert 'llada_version_requests_total{model="a",status="200",version="one"} 1.0' in text
    assert 'llada_version_requests_total{model="a",status="200",version="two"} 2.0' in text
    assert 'llada_version_seconds_count{model="a",version="two"} 2.0' in text
    assert 'status="400"' not in text.split("llada_version_requests_total", 1)[1].split("# HELP")[0]


def test_a_body_without_a_model_is_the_first_ones(backends: list[Counting]) -> None:
    a, b, _ = backends

    async def read() -> None:
        catalog = Catalog({"a": Model(a), "b": Model(b)})
        async for _ in catalog.stream(CompletionBody.model_validate(FAST), RequestIds("x")):
            pass

    asyncio.run(read())
    assert (a.requests, b.requests) == (1, 0)
