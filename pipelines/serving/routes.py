"""The HTTP side of the endpoint: OpenAI's routes over anything that streams events, normally a Ray Serve deployment.

One small process, apart from the replicas: it answers /health and /metrics while they are busy, turns a full queue
into an OpenAI error, and sees every request, so that its counters cover all replicas. It needs no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llada import __version__
from llada.sampling.events import Started
from pipelines.serving.access_log import REQUEST_ID, AccessLog, RequestIds, ids_of, notes
from pipelines.serving.dialects.body import SamplingBody, parse_body
from pipelines.serving.dialects.calls import AnyBody, CallBody, CallWriter, DetokenizeBody, TokenizeBody
from pipelines.serving.dialects.chat import ChatBody, ChatWriter
from pipelines.serving.dialects.completions import CompletionBody, CompletionWriter
from pipelines.serving.dialects.responses import ResponsesBody, ResponsesWriter
from pipelines.serving.dialects.writer import ReplyWriter
from pipelines.serving.errors import RequestError, shorten
from pipelines.serving.events import Refused, ReplicaEvent, Restarted, Serving, Written
from pipelines.serving.keys import Guard, KeyLimits
from pipelines.serving.limits import DEFAULT_LIMITS, RequestLimits
from pipelines.serving.metrics import GatewayMetrics, RequestTrack
from pipelines.serving.openapi import openapi_schema
from pipelines.serving.page import add_page

T = TypeVar("T")
_log = logging.getLogger(__name__)
# A client's own time limit, which Ray's proxy enforces with a plain text 408 (a value that is not positive: none).
_TIMEOUT_HEADER = "x-request-timeout-seconds"
_READ = ["GET", "HEAD"]
# A body that is parsed in less time than it takes to give it to a thread.
_SHORT_BYTES = 1 << 14


@dataclass(frozen=True)
class Dialect:
    """A way to ask for text: where, with which body, and in which form the reply comes."""

    path: str
    body: type[SamplingBody] | type[CallBody]
    writer: Callable[[Any, str], Any]
    """A ReplyWriter, or, of what does not stream, a CallWriter."""


DIALECTS = (
    Dialect("/v1/completions", CompletionBody, CompletionWriter),
    Dialect("/v1/chat/completions", ChatBody, ChatWriter),
    Dialect("/v1/responses", ResponsesBody, ResponsesWriter),
    Dialect("/tokenize", TokenizeBody, CallWriter),
    Dialect("/detokenize", DetokenizeBody, CallWriter),
)


@dataclass(frozen=True)
class Health:
    """Whether requests can be served, in a word, and why not in a line that a stranger may read."""

    status: Literal["ok", "starting", "unavailable", "draining"]
    reason: str | None = None


class Backend(Protocol):
    """Where the replies come from."""

    def stream(self, body: AnyBody, ids: RequestIds) -> AsyncGenerator[ReplicaEvent, None]:
        """The events of a request. Raises RequestError when there is no place for it; closing it cancels the work."""

    def health(self) -> Health:
        """What is known now; asks nobody."""


@dataclass(frozen=True)
class Access:
    """Who may ask, from where, and what is written down of it."""

    keys: Sequence[str] = ()
    """API keys; empty: everybody may ask."""
    key_limits: KeyLimits = KeyLimits()
    cors_origins: Sequence[str] = ()
    """Sites whose pages may ask from a browser; "*": any."""
    logs_prompts: bool = False
    """The access log has the prompts as well."""
    echoes_id: bool = True
    """See `AccessLog`."""


def build_api(
    backend: Backend,
    model_id: str,
    limits: RequestLimits = DEFAULT_LIMITS,
    access: Access = Access(),
    metrics: GatewayMetrics | None = None,
    facts: Mapping[str, Any] | None = None,
    more_models: Mapping[str, Mapping[str, Any]] | None = None,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """The application: the dialects' paths, /v1/models, /health, /metrics and a page at /.

    `facts`: what /v1/models says of the model beside its name (`model_facts` in card.py). `model_id` answers requests that name
    no model, `more_models` (with facts of their own) those that name them. `lifespan` is around all that it answers.
    """
    api = FastAPI(
        title="llada",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    if access.keys:
        api.add_middleware(Guard, keys=access.keys, limits=access.key_limits)
    api.add_middleware(_WithoutTrailingSlash)
    if access.cors_origins:
        # Outside of the guard: a browser asks for leave without the key. (It sends no cookies, so that "*" is harmless.)
        api.add_middleware(
            CORSMiddleware,
            allow_origins=access.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "Retry-After", "llada-version", "system-fingerprint"],
        )
    api.add_middleware(_Versioned)
    api.add_middleware(AccessLog, echoes_id=access.echoes_id)
    metrics = metrics or GatewayMetrics()
    created = int(time.time())
    models = {model_id: facts or {}, **(more_models or {})}
    cards = {
        name: {"id": name, "object": "model", "created": created, "owned_by": "llada", **said}
        for name, said in models.items()
    }

    @api.api_route("/v1/models", methods=_READ)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": list(cards.values())}

    @api.api_route("/v1/models/{name:path}", methods=_READ)
    async def get_model(name: str) -> dict[str, Any]:
        _check_model(name, tuple(models))
        return cards[name]

    schema = openapi_schema(DIALECTS)

    @api.api_route("/openapi.json", methods=_READ)
    async def show_schema() -> JSONResponse:
        return JSONResponse(schema)

    for dialect in DIALECTS:
        api.post(dialect.path)(_endpoint(dialect, backend, metrics, tuple(models), limits, access))

    @api.api_route("/health", methods=_READ)
    async def health() -> Response:
        now = backend.health()
        content = {"status": now.status} | ({} if now.reason is None else {"reason": now.reason})
        return JSONResponse(content, 200 if now.status == "ok" else 503)

    @api.api_route("/metrics", methods=_READ)
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    add_page(api)

    @api.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers())

    @api.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        message = f"{shorten(request.method)} {shorten(request.url.path)}: {error.detail}"
        return JSONResponse(RequestError(error.status_code, message).body(), error.status_code, error.headers)

    @api.exception_handler(Exception)  # logged by Starlette
    async def fail(_: Request, __: Exception) -> Response:
        return JSONResponse(RequestError(500, "the server failed; its log says why").body(), 500)

    return api


class _Versioned:
    """Every answer says which version of this code has given it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def versioned(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["llada-version"] = __version__
            await send(message)

        await self._app(scope, receive, versioned)


class _WithoutTrailingSlash:
    """/v1/models/ is /v1/models. (A redirect would not do: clients send a GET after a POST that is redirected.)"""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


def _check_model(name: str, models: Sequence[str]) -> None:
    if name not in models:
        served = " and ".join(map(repr, models))
        message = f"the model {shorten(name)!r} does not exist; this endpoint serves {served}"
        raise RequestError(404, message, param="model", code="model_not_found")


def _endpoint(
    dialect: Dialect,
    backend: Backend,
    metrics: GatewayMetrics,
    models: Sequence[str],
    limits: RequestLimits,
    access: Access,
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await _answer(dialect, backend, metrics, request, models, limits, access)

    return endpoint


async def _answer(
    dialect: Dialect,
    backend: Backend,
    metrics: GatewayMetrics,
    request: Request,
    models: Sequence[str],
    limits: RequestLimits,
    access: Access,
) -> Response:
    """Run a request. Whatever goes wrong before its first text is an HTTP status, not a broken stream."""
    timer = _Timer(_seconds(request, limits))
    with contextlib.ExitStack() as stack:
        track = stack.enter_context(
            metrics.track(dialect.path, notes(request), request.scope["state"].get("account"))
        )
        try:
            _check_headers(request)
            raw = await timer.wait_for(_read_body(request, limits.body_bytes))
            kind = cast("type[SamplingBody]", dialect.body)
            body: AnyBody
            if len(raw) <= _SHORT_BYTES:
                body = parse_body(kind, raw)
            else:  # a large one must not hold up the streams of the others
                body = await asyncio.to_thread(parse_body, kind, raw)
            if body.model is not None:
                _check_model(body.model, models)
            track.model = body.model or models[0]
            limits.check(body)
            track.notes |= {"stream": body.stream, "choices": body.num_prompts * body.n}
            if access.logs_prompts:
                track.notes |= body.model_dump(include={body.prompt_field, "suffix"})
            writer = dialect.writer(body, track.model)
            events = _follow(backend.stream(body, ids_of(request)), writer, track, timer)
            if not body.stream:
                async with contextlib.aclosing(events):
                    async for event in events:
                        writer.add(event)
                track.status = 200
                return JSONResponse(writer.whole(), headers=_fingerprint(writer))
            first = await anext(events)
        except RequestError as error:
            track.status = error.status
            raise
        except ClientDisconnect:  # during its upload
            return Response(status_code=track.status)
        except Exception as error:
            _log.exception("a request failed")
            track.status = 500
            raise RequestError(500, "the model failed on this request; the server's log says why") from error
        lasting = stack.pop_all()  # the stream ends it
    return _EventStream(_sse(first, events, writer, track), events, lasting, _fingerprint(writer))


def _fingerprint(writer: ReplyWriter) -> dict[str, str]:
    return {} if writer.system_fingerprint is None else {"system-fingerprint": writer.system_fingerprint}


def _check_headers(request: Request) -> None:
    """Raises RequestError 415 for a body that is declared to be something else than JSON in UTF-8."""
    declared = request.headers.get("content-type", "application/json")
    kind, _, parameters = declared.lower().partition(";")
    charset = parameters.partition("charset=")[2].strip(' "')
    if kind.strip() != "application/json" or charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise RequestError(415, f"Content-Type {shorten(declared)!r} is not supported: send application/json")
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        raise RequestError(415, f"Content-Encoding {shorten(coding)!r} is not supported: send the plain body")


async def _read_body(request: Request, limit: int) -> bytes:
    """Raises RequestError 413 as soon as it is known that there are more than `limit` bytes, and ClientDisconnect."""
    error = RequestError(413, f"the body has more than the {limit:,} bytes allowed", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise error
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                break
            parts.append(part)
    except Exception as gone:
        # Ray's proxy passes the parts on, and breaks off as the client has: its own error may be here before the word of that.
        raise ClientDisconnect from gone
    if size > limit:
        raise error
    return b"".join(parts)


def _seconds(request: Request, limits: RequestLimits) -> float:
    """How long the request may take: the limit, or less when its client says so."""
    try:
        asked = float(request.headers.get(_TIMEOUT_HEADER, ""))
    except ValueError:
        return limits.seconds
    if not (math.isfinite(asked) and asked > 0):
        return limits.seconds
    return min(limits.seconds, 0.9 * asked)  # before Ray's proxy cuts it off


class _Timer:
    """The time that a request has left. What takes longer is cancelled, and ends as RequestError 408."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = asyncio.get_running_loop().time() + seconds

    async def wait_for(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout_at(self._deadline) as timeout:
                return await work
        except TimeoutError as error:
            if not timeout.expired():
                raise
            message = f"the request took longer than the {self._seconds:g} s that it has"
            raise RequestError(408, message, code="timeout") from error


class _EventStream(StreamingResponse):
    """Server-sent events; however the answer ends, also before its first byte, the work and the count of it end too."""

    def __init__(
        self,
        frames: AsyncIterator[str],
        events: AsyncGenerator[Written, None],
        lasting: contextlib.ExitStack,
        headers: dict[str, str],
    ) -> None:
        # No proxy may collect the events: X-Accel-Buffering is nginx's name for that.
        headers = headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(frames, media_type="text/event-stream", headers=headers)
        self._events, self._lasting = events, lasting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lasting:
            async with contextlib.aclosing(self._events):
                await super().__call__(scope, receive, send)


async def _follow(
    replies: AsyncGenerator[ReplicaEvent, None], writer: ReplyWriter, track: RequestTrack, timer: _Timer
) -> AsyncGenerator[Written, None]:
    """The texts and ends of a request; counts them, and tells the writer who answers. Raises RequestError for a request
    that was refused or took too long."""
    async with contextlib.aclosing(replies) as events:
        while (event := await timer.wait_for(anext(events, None))) is not None:
            track.see(event)
            if isinstance(event, Refused):
                raise RequestError(event.status, event.message, param=event.param, code=event.code)
            if isinstance(event, Serving):
                writer.system_fingerprint, writer.run_id = event.fingerprint, event.run_id
            elif isinstance(event, Restarted):
                writer.restart()
            elif not isinstance(event, Started):
                yield event


async def _sse(
    first: Written, events: AsyncGenerator[Written, None], writer: ReplyWriter, track: RequestTrack
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
