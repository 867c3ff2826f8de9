"""The HTTP side of the endpoint: OpenAI's routes over anything that streams events, normally a Ray Serve deployment.

One small process, apart from the replicas: it answers /health and /metrics while they are busy, turns a full queue
into an OpenAI error, and sees every request, so that its counters cover all replicas. It needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from pipelines.serving.events import Event, Finished, Refused, Started, Text
from pipelines.serving.metrics import GatewayMetrics, RequestTrack
from pipelines.serving.openai_api import ChatBody, CompletionBody, RequestError, SamplingBody, parse_body

_log = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "static" / "index.html"


class Backend(Protocol):
    """Where the replies come from."""

    def stream(self, body: SamplingBody) -> AsyncGenerator[Event, None]:
        """The events of a request. Raises RequestError when there is no place for it; closing it cancels the work."""

    async def unhealthy(self) -> str | None:
        """None when requests can be served, else why not."""


def build_api(backend: Backend, model_id: str) -> FastAPI:
    """The application: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics and a page at /."""
    api = FastAPI(title="llada", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = GatewayMetrics()
    created = int(time.time())
    card = {"id": model_id, "object": "model", "created": created, "owned_by": "llada"}

    @api.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @api.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        _check_model(name, model_id)
        return card

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(backend, metrics, request, CompletionBody, model_id)

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(backend, metrics, request, ChatBody, model_id)

    @api.get("/health")
    async def health() -> Response:
        reason = await backend.unhealthy()
        content = {"status": "ok"} if reason is None else {"status": "unavailable", "reason": reason}
        return JSONResponse(content, 200 if reason is None else 503)

    @api.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @api.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    @api.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        return JSONResponse(error.body(), error.status, headers)

    @api.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(RequestError(error.status_code, message).body(), error.status_code, error.headers)

    return api


def _check_model(name: str, model_id: str) -> None:
    if name != model_id:
        message = f"the model {name!r} does not exist; this endpoint serves {model_id!r}"
        raise RequestError(404, message, param="model", code="model_not_found")


async def _answer(
    backend: Backend, metrics: GatewayMetrics, request: Request, kind: type[SamplingBody], model_id: str
) -> Response:
    """Run a request. Whatever goes wrong before its first text is an HTTP status, not a broken stream."""
    with contextlib.ExitStack() as stack:
        track = stack.enter_context(metrics.track(request.url.path))
        try:
            body = parse_body(kind, await request.body())
            _check_model(body.model or model_id, model_id)
            writer = _Writer(body, model_id)
            events = _follow(backend, body, track)
            if not body.stream:
                async with contextlib.aclosing(events):
                    async for event in events:
                        writer.add(event)
                track.status = 200
                return JSONResponse(writer.whole())
            first = await anext(events)
        except RequestError as error:
            track.status = error.status
            raise
        except Exception as error:
            _log.exception("a request failed")
            track.status = 500
            raise RequestError(500, "the model failed on this request; the server's log says why") from error
        lasting = stack.pop_all()  # the stream ends it
    chunks = _sse(first, events, writer, track, lasting)
    # No proxy may collect the events: X-Accel-Buffering is nginx's name for that.
    return StreamingResponse(
        chunks,
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _follow(backend: Backend, body: SamplingBody, track: RequestTrack) -> AsyncGenerator[Event, None]:
    """The texts and ends of a request; counts them. Raises RequestError for one that was refused."""
    async with contextlib.aclosing(backend.stream(body)) as events:
        async for event in events:
            track.see(event)
            if isinstance(event, Refused):
                raise RequestError(event.status, event.message, param=event.param, code=event.code)
            if not isinstance(event, Started):
                yield event


async def _sse(
    first: Event,
    events: AsyncGenerator[Event, None],
    writer: _Writer,
    track: RequestTrack,
    lasting: contextlib.ExitStack,
) -> AsyncIterator[str]:
    """Server-sent events. A failure in their middle is one more event with OpenAI's error object."""
    with lasting:
        async with contextlib.aclosing(events):
            try:
                for chunk in writer.chunks(first):
                    yield _line(chunk)
                async for event in events:
                    for chunk in writer.chunks(event):
                        yield _line(chunk)
                if writer.body.stream_options.include_usage:
                    yield _line(writer.usage_chunk())
                track.status = 200
            except Exception as error:
                known = isinstance(error, RequestError)
                _log.log(logging.INFO if known else logging.ERROR, "a stream broke off", exc_info=not known)
                broken = (
                    error if isinstance(error, RequestError) else RequestError(500, "the model failed midway")
                )
                track.status = broken.status
                yield _line(broken.body())
            yield "data: [DONE]\n\n"


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


class _Writer:
    """Turns the events of one request into OpenAI's objects, whole or in chunks."""

    def __init__(self, body: SamplingBody, model_id: str) -> None:
        self.body, self.is_chat = body, isinstance(body, ChatBody)
        prefix, kind = ("chatcmpl", "chat.completion") if self.is_chat else ("cmpl", "text_completion")
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model_id,
        }
        self._texts: dict[int, list[str]] = {}
        self._ends: dict[int, Finished] = {}

    def add(self, event: Event) -> None:
        if isinstance(event, Text):
            self._texts.setdefault(event.index, []).append(event.text)
        elif isinstance(event, Finished):
            self._ends[event.index] = event

    def whole(self) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        choices = []
        for index, end in sorted(self._ends.items()):
            text = "".join(self._texts.get(index, []))
            message = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            choices.append({"index": index, **message, "logprobs": None, "finish_reason": end.reason})
        return {**self._head, "choices": choices, **self._totals()}

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks that an event becomes."""
        chunks = []
        if isinstance(event, Text | Finished) and event.index not in self._texts:
            self._texts[event.index] = []
            if self.is_chat:
                chunks.append(self._chunk(event.index, {"delta": {"role": "assistant", "content": ""}}))
        self.add(event)
        if isinstance(event, Text):
            part: dict[str, Any] = (
                {"delta": {"content": event.text}} if self.is_chat else {"text": event.text}
            )
            if event.canvas is not None:
                part["canvas"] = event.canvas
            chunks.append(self._chunk(event.index, part))
        elif isinstance(event, Finished):
            empty: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
            chunks.append(self._chunk(event.index, empty, event.reason))
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk behind the last one, for those who asked for it."""
        return {**self._chunk_head(), "choices": [], **self._totals()}

    def _chunk(self, index: int, part: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, **part, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.body.stream_options.include_usage else {}
        return {**self._chunk_head(), "choices": [choice], **usage}

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self.is_chat else self._head

    def _totals(self) -> dict[str, Any]:
        """OpenAI's usage, and what it took: forwards of the network, and tokens for each of them."""
        ends = self._ends.values()
        prompt, completion = sum(e.prompt_tokens for e in ends), sum(e.completion_tokens for e in ends)
        forwards = sum(e.forwards for e in ends)
        return {
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            },
            "denoising": {
                "forwards": forwards,
                "tokens_per_forward": round(completion / forwards, 3) if forwards else 0.0,
            },
        }
