"""One request in front of a model in this process: what it may take, and how it ends when it goes wrong or its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from llada.sampling.config import SamplingConfig
from llada.sampling.events import Event, Finished, Started, Text, Token
from pipelines.serving import answer as answer_module
from pipelines.serving.access_log import RequestIds
from pipelines.serving.backend import Health
from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.limits import RequestLimits
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import build_api

Call = Callable[..., httpx.Response]
Serve = Callable[[FastAPI], contextlib.AbstractContextManager[str]]
FAST = {"model": "tiny", "max_tokens": 20, "block_length": 8, "temperature": 1.0, "seed": 3}
ANY = RequestLimits()


BY_HAND = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}


class Slow:
    """A backend that does not come to its end; how many requests it has in hand."""

    open = 0

    async def stream(self, body: SamplingBody, ids: RequestIds) -> AsyncGenerator[Event, None]:
        self.open += 1
        try:
            yield Started(0)
            yield Text(0, "well")
            await asyncio.sleep(3600)
        finally:
            self.open -= 1

    def health(self) -> Health:
        return Health("ok")


def ask(
    parts: Iterable[bytes], *, limits: RequestLimits = ANY, pause_s: float = 0, **headers: str
) -> tuple[httpx.Response, str]:
    """The answer to a body that comes in parts, and the metrics after it."""
    backend = Slow()

    async def send() -> tuple[httpx.Response, str]:
        async def upload() -> AsyncIterator[bytes]:
            for part in parts:
                yield part
                await asyncio.sleep(pause_s)

        transport = httpx.ASGITransport(build_api(backend, "tiny", limits))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            answer = await client.post("/v1/completions", content=upload(), headers=named)
            return answer, (await client.get("/metrics")).text

    answer, metrics = asyncio.run(send())
    assert backend.open == 0
    assert "llada_requests_queued 0.0" in metrics
    assert "llada_requests_running 0.0" in metrics
    assert f'llada_requests_total{{route="/v1/completions",status="{answer.status_code}"}} 1.0' in metrics
    return answer, metrics


def test_a_large_body_is_refused_before_it_is_read() -> None:
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 1000
            yield b"x" * 1000

    limits = RequestLimits(body_bytes=10_000)
    answer, _ = ask(endless(), limits=limits, content_length="10001")
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert read == 0
    answer, _ = ask(endless(), limits=limits)  # in chunks, of no declared length
    assert answer.status_code == 413
    assert "more than the 10,000 bytes" in answer.json()["error"]["message"]
    assert read == 11_000
    exact = b'{"prompt": "x", "model": "none"' + b" " * 9968 + b"}"
    assert len(exact) == 10_000
    assert ask([exact], limits=limits)[0].status_code == 404


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_has_its_time(streams: bool) -> None:
    """Also one of which the answer has begun: then the error is an event of the stream."""
    body = [json.dumps({"prompt": "Go", "stream": streams}).encode()]
    seconds = (
        2.0 if streams else 0.2
    )  # in which an answer must have begun, also while others work, or nothing need be done
    for limits, headers in [
        (RequestLimits(seconds=seconds), {}),
        (RequestLimits(), {"x_request_timeout_seconds": str(seconds)}),
    ]:
        if not streams:
            answer, _ = ask(body, limits=limits, **headers)
            error = answer.json()["error"]
            assert answer.status_code == 408
        else:
            error = broken_stream(body[0], limits, headers)
        assert (error["type"], error["code"]) == ("timeout_error", "timeout")


def broken_stream(body: bytes, limits: RequestLimits, headers: dict[str, str]) -> dict[str, Any]:
    async def send() -> str:
        transport = httpx.ASGITransport(build_api(Slow(), "tiny", limits))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            answer = await client.post("/v1/completions", content=body, headers=named)
            assert answer.status_code == 200
            return answer.text

    *_, error, done, _ = asyncio.run(send()).split("\n\n")
    assert done == "data: [DONE]"
    return json.loads(error.removeprefix("data: "))["error"]


def test_a_slow_upload_has_its_time_too() -> None:
    answer, _ = ask([b'{"prompt": "x"'] + [b" "] * 100, pause_s=0.05, limits=RequestLimits(seconds=0.2))
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")


def test_an_upload_that_stalls_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module, "_BODY_PAUSE_S", 1.5)
    body = [b'{"prompt": "x", ', b'"model": "none"', b"}"]
    answer, _ = ask(body, pause_s=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
    assert "nothing of the body has come" in answer.json()["error"]["message"]
    # Slow, and on its way.
    assert ask([*body, *[b" "] * 15], pause_s=0.1)[0].status_code == 404


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", "json"]
)
def test_a_body_that_is_declared_to_be_something_else(kind: str) -> None:
    answer, _ = ask([b'{"prompt": "x", "model": "none"}'], content_type=kind)
    assert answer.status_code == 415
    assert "send application/json" in answer.json()["error"]["message"]


def test_json_may_be_declared_in_full() -> None:
    body = [b'{"prompt": "x", "model": "none"}']
    assert ask(body, content_type="Application/JSON; charset=UTF-8")[0].status_code == 404
    assert ask(body, content_type='application/json; x=1; charset="utf-8"; y=2')[0].status_code == 404
    answer, _ = ask(body, content_encoding="gzip")
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "invalid_request_error")


@pytest.mark.parametrize("length", ["Content-Length: 15", "Transfer-Encoding: chunked"])
def test_a_body_that_a_proxy_has_lost_is_named_with_the_cause(served: Serve, length: str) -> None:
    """uvicorn as it is, as Ray's proxy has it, and an offer to upgrade the connection."""

    def ask(url: str, *headers: str) -> dict[str, Any]:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            lines = ["POST /v1/completions HTTP/1.1", *headers, "Connection: Upgrade", "Upgrade: h2c", "", ""]
            client.sendall("\r\n".join(lines).encode())
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.status == 400
            error: dict[str, Any] = json.loads(answer.read())["error"]
            return error

    with served(build_api(Slow(), "tiny")) as url:
        error = ask(url, "Host: x", length)
        assert error["type"] == "invalid_request_error"
        assert "'Upgrade: h2c'" in error["message"]
        assert "send plain HTTP/1.1" in error["message"]
        for nothing in ("Content-Length: 0", "A: b"):  # none was meant to come
            assert "body" in (message := ask(url, nothing)["message"])
            assert "Upgrade" not in message


@pytest.mark.parametrize("end", [{"type": "http.disconnect"}, RuntimeError("the call was cancelled")])
def test_a_client_who_goes_during_its_upload_is_no_failure(
    caplog: pytest.LogCaptureFixture, end: dict[str, Any] | Exception
) -> None:
    """Whatever of it is heard first: that it has gone, or that who passes its body on has broken off."""
    messages = [{"type": "http.request", "body": b'{"prompt": ', "more_body": True}, end]

    async def receive() -> dict[str, Any]:
        message = messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return message

    async def send(_: Any) -> None:
        pass

    async def upload_and_go() -> str:
        api = build_api(Slow(), "tiny")
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [],
            "query_string": b"",
        }
        await api(scope, receive, send)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            return (await client.get("/metrics")).text

    metrics = asyncio.run(upload_and_go())
    assert 'llada_requests_total{route="/v1/completions",status="499"} 1.0' in metrics
    assert "llada_requests_queued 0.0" in metrics
    assert "failed" not in caplog.text


def test_a_failure_before_the_first_text_is_a_status_and_later_an_event(
    small_model: Path, call: Call
) -> None:
    """Also for a stream: the client gets 500 instead of a stream that breaks off, as long as there is none."""
    denoiser = Denoiser(str(small_model), SamplingConfig(steps=None, block_length=32))
    network = denoiser.engine.model

    class Breaking:
        config = network.config
        forwards = 0
        last = 0  # forwards that go well

        def __call__(self, tokens: Any, **inputs: Any) -> Any:
            self.forwards += 1
            if self.forwards > self.last:
                raise RuntimeError("out of memory")
            return network(tokens, **inputs)

    breaking = denoiser.engine.model = Breaking()
    body = {**FAST, "prompt": "Go", "stream": True, "block_length": 4}
    early = call(denoiser, "POST", "/v1/completions", body)
    breaking.forwards, breaking.last = 0, 10
    late = call(denoiser, "POST", "/v1/completions", body)
    assert early.status_code == 500
    assert early.json()["error"]["type"] == "server_error"
    assert "memory" not in early.text  # what went wrong inside is for the log
    assert late.status_code == 200
    *_, error, done, _ = late.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    assert done == "data: [DONE]"
    assert call(denoiser, "GET", "/health").status_code == 200  # two failures are no broken machine
    breaking.forwards, breaking.last = 0, 0
    call(denoiser, "POST", "/v1/completions", body)
    health = call(denoiser, "GET", "/health")
    assert health.status_code == 503
    assert "last 3 requests failed" in health.json()["reason"]
    denoiser.close()


def test_a_client_who_goes_before_the_first_byte_leaves_nothing_behind() -> None:
    class Endless:
        """A backend of which each request must be closed."""

        open = 0

        async def stream(self, body: SamplingBody, ids: RequestIds) -> AsyncGenerator[Event, None]:
            self.open += 1
            try:
                yield Started(0)
                while True:
                    yield Text(0, "on and ")
            finally:
                self.open -= 1

        def health(self) -> Health:
            return Health("ok")

    backend = Endless()
    api = build_api(backend, "tiny")
    content = json.dumps({**FAST, "prompt": "Go", "stream": True}).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content}

    async def send(message: Any) -> None:
        raise OSError("the connection is closed")

    async def ask_and_go() -> str:
        with contextlib.suppress(Exception):
            await api({**BY_HAND, "asgi": {"spec_version": "2.4"}}, receive, send)
        assert backend.open == 0
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            return (await client.get("/metrics")).text

    metrics = asyncio.run(ask_and_go())
    assert "llada_requests_running 0.0" in metrics
    assert "llada_requests_queued 0.0" in metrics
    assert 'llada_requests_total{route="/v1/completions",status="499"} 1.0' in metrics


def test_the_work_for_who_leaves_ends_with_him(served: Serve) -> None:
    """At a real server: one waits for a whole reply, one for the first text of a stream, and both close their connection."""

    class Working:
        """A backend that says nothing for an hour."""

        open, ended = 0, 0

        async def stream(self, body: SamplingBody, ids: RequestIds) -> AsyncGenerator[Event, None]:
            self.open += 1
            try:
                yield Started(0)
                await asyncio.sleep(3600)
            finally:
                self.ended += 1

        def health(self) -> Health:
            return Health("ok")

    backend = Working()

    async def leave(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            bodies = [{**FAST, "prompt": "Go", "stream": stream} for stream in (False, True)]
            asking = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
            while backend.open < 2:
                await asyncio.sleep(0.01)
            assert backend.ended == 0
            for task in asking:
                task.cancel()
            async with asyncio.timeout(60):
                while backend.ended < 2:
                    await asyncio.sleep(0.01)
                counted = 'llada_requests_total{route="/v1/completions",status="499"} 2.0'
                while counted not in (await client.get("/metrics")).text:
                    await asyncio.sleep(0.01)

    with served(build_api(backend, "tiny")) as url:
        asyncio.run(leave(url))


def test_who_does_not_read_does_not_keep_his_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket takes no more, for ever."""
    monkeypatch.setattr(answer_module, "_LAST_BYTES_S", 0.2)
    backend = Slow()
    api = build_api(backend, "tiny", RequestLimits(seconds=0.2))
    content = json.dumps({"prompt": "Go", "stream": True}).encode()
    messages = iter([{"type": "http.request", "body": content}])

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is None:
            await asyncio.Event().wait()
        return message or {}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(api({**BY_HAND, "asgi": {"spec_version": "2.3"}}, receive, send), 60))
    assert backend.open == 0


def test_a_large_answer_holds_up_nobody() -> None:
    """20 alternatives of each of 2,048 tokens are megabytes of JSON. The event loop goes on while they are written."""
    top = tuple((b"word", -1.0 - place) for place in range(20))
    tokens = tuple(Token(7, b"word", 0, 0, -1.0, top) for _ in range(2048))
    turns = turns_before = 0

    class Wordy(Slow):
        async def stream(self, body: SamplingBody, ids: RequestIds) -> AsyncGenerator[Event, None]:
            nonlocal turns_before
            yield Started(0)
            yield Text(0, "word" * 2048, tokens, 2048)
            yield Finished(0, "length", 1, 2048, 2048)
            turns_before = turns

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(build_api(Wordy(), "tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            taking = asyncio.create_task(take_turns())
            body = {"messages": [{"role": "user", "content": "Go"}], "logprobs": True, "top_logprobs": 20}
            answer = await client.post("/v1/chat/completions", json=body)
            taking.cancel()
            return answer

    assert len(asyncio.run(ask()).json()["choices"][0]["logprobs"]["content"]) == 2048
    assert turns - turns_before > 100  # some ten where it is written in the loop
