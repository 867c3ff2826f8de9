"""The HTTP side of the endpoint: OpenAI's routes over anything that streams events, normally a Ray Serve deployment.

One small process, apart from the replicas: it answers /health and /metrics while they are busy, turns a full queue
into an OpenAI error, and sees every request, so that its counters cover all replicas. It needs no torch.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from llada.sampling.events import Event, Started
from pipelines.serving.dialects.body import SamplingBody, parse_body
from pipelines.serving.dialects.chat import ChatBody, ChatWriter
from pipelines.serving.dialects.completions import CompletionBody, CompletionWriter
from pipelines.serving.dialects.writer import ReplyWriter
from pipelines.serving.errors import RequestError
from pipelines.serving.events import Refused, ReplicaEvent
from pipelines.serving.metrics import GatewayMetrics, RequestTrack

_log = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "static" / "index.html"


@dataclass(frozen=True)
class Dialect:
    """A way to ask for text: where, with which body, and in which form the reply comes."""

    path: str
    body: type[SamplingBody]
    writer: type[ReplyWriter]


DIALECTS = (
    Dialect("/v1/completions", CompletionBody, CompletionWriter),
    Dialect("/v1/chat/completions", ChatBody, ChatWriter),
)


class Backend(Protocol):
    """Where the replies come from."""

    def stream(self, body: SamplingBody) -> AsyncGenerator[ReplicaEvent, None]:
        """The events of a request. Raises RequestError when there is no place for it; closing it cancels the work."""

    async def unhealthy(self) -> str | None:
        """None when requests can be served, else why not."""


def build_api(backend: Backend, model_id: str) -> FastAPI:
    """The application: the dialects' paths, /v1/models, /health, /metrics and a page at /."""
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

    for dialect in DIALECTS:
        api.post(dialect.path)(_endpoint(dialect, backend, metrics, model_id))

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


def _endpoint(
    dialect: Dialect, backend: Backend, metrics: GatewayMetrics, model_id: str
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await _answer(dialect, backend, metrics, request, model_id)

    return endpoint


async def _answer(
    dialect: Dialect, backend: Backend, metrics: GatewayMetrics, request: Request, model_id: str
) -> Response:
    """Run a request. Whatever goes wrong before its first text is an HTTP status, not a broken stream."""
    with contextlib.ExitStack() as stack:
        track = stack.enter_context(metrics.track(request.url.path))
        try:
            body = parse_body(dialect.body, await request.body())
            _check_model(body.model or model_id, model_id)
            writer = dialect.writer(body, model_id)
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
    return _EventStream(_sse(first, events, writer, track), events, lasting)


class _EventStream(StreamingResponse):
    """Server-sent events; however the answer ends, also before its first byte, the work and the count of it end too."""

    def __init__(
        self, frames: AsyncIterator[str], events: AsyncGenerator[Event, None], lasting: contextlib.ExitStack
    ) -> None:
        # No proxy may collect the events: X-Accel-Buffering is nginx's name for that.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(frames, media_type="text/event-stream", headers=headers)
        self._events, self._lasting = events, lasting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lasting:
            async with contextlib.aclosing(self._events):
                await super().__call__(scope, receive, send)


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
    first: Event, events: AsyncGenerator[Event, None], writer: ReplyWriter, track: RequestTrack
) -> AsyncIterator[str]:
    """Server-sent events. A failure in their middle is one more event with OpenAI's error object."""
    try:
        for chunk in writer.chunks(first):
            yield writer.frame(chunk)
        async for event in events:
            for chunk in writer.chunks(event):
                yield writer.frame(chunk)
        for chunk in writer.closing_chunks():
            yield writer.frame(chunk)
        track.status = 200
    except Exception as error:
        known = isinstance(error, RequestError)
        _log.log(logging.INFO if known else logging.ERROR, "a stream broke off", exc_info=not known)
        broken = error if isinstance(error, RequestError) else RequestError(500, "the model failed midway")
        track.status = broken.status
        yield writer.frame(broken.body())
    yield writer.end_of_stream
