"""The HTTP side of the endpoint: OpenAI's routes over anything that streams events, normally a Ray Serve deployment.

One small process, apart from the replicas: it answers /health and /metrics while they are busy, turns a full queue
into an OpenAI error, and sees every request, so that its counters cover all replicas. It needs no torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llada import __version__
from pipelines.serving.access_log import REQUEST_ID, AccessLog
from pipelines.serving.answer import Dialect, answer, check_model
from pipelines.serving.backend import Backend
from pipelines.serving.dialects.calls import CallWriter, DetokenizeBody, TokenizeBody
from pipelines.serving.dialects.chat import ChatBody, ChatWriter
from pipelines.serving.dialects.completions import CompletionBody, CompletionWriter
from pipelines.serving.dialects.responses import ResponsesBody, ResponsesWriter
from pipelines.serving.errors import RequestError, shorten
from pipelines.serving.keys import Accounts, Guard, KeyLimits
from pipelines.serving.limits import DEFAULT_LIMITS, RequestLimits
from pipelines.serving.metrics import GatewayMetrics
from pipelines.serving.openapi import openapi_schema
from pipelines.serving.page import PAGES, add_page

_log = logging.getLogger(__name__)
_READ = ["GET", "HEAD"]


DIALECTS = (
    Dialect("/v1/completions", CompletionBody, CompletionWriter),
    Dialect("/v1/chat/completions", ChatBody, ChatWriter),
    Dialect("/v1/responses", ResponsesBody, ResponsesWriter),
    Dialect("/tokenize", TokenizeBody, CallWriter),
    Dialect("/detokenize", DetokenizeBody, CallWriter),
)


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
    no model, `more_models` (with facts of their own) those that name them. `lifespan` is around all that it answers. Where keys
    are asked for, `state.accounts` of the application has the good ones (`Accounts`).
    """
    api = FastAPI(
        title="llada",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    metrics = metrics or GatewayMetrics()
    count_refusal = refusal_counter(metrics)
    api.add_middleware(_Failures)
    if access.keys:
        api.state.accounts = Accounts(access.keys, access.key_limits)
        api.add_middleware(Guard, accounts=api.state.accounts, refused=count_refusal)
    api.add_middleware(_WithoutTrailingSlash)
    if access.cors_origins:
        # Outside of the guard: a browser asks for leave without the key. (It sends no cookies, so that "*" is harmless.)
        api.add_middleware(
            _Origins,
            refused=count_refusal,
            allow_origins=access.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "Retry-After", "llada-version", "system-fingerprint"],
        )
    api.add_middleware(_Versioned)
    api.add_middleware(AccessLog, echoes_id=access.echoes_id)
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
        check_model(name, tuple(models))
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
    async def refuse(request: Request, error: RequestError) -> Response:
        if request.scope["path"] not in {dialect.path for dialect in DIALECTS}:  # whose requests are tracked
            count_refusal(request.scope["path"], error.status)
        return JSONResponse(error.body(), error.status, error.headers())

    @api.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        count_refusal(request.scope["path"], error.status_code)
        message = f"{shorten(request.method)} {shorten(request.url.path)}: {error.detail}"
        return JSONResponse(RequestError(error.status_code, message).body(), error.status_code, error.headers)

    return api


def refusal_counter(metrics: GatewayMetrics) -> Callable[[str, int], None]:
    """Counts, by path and status, what is refused before its route is reached; of paths that are none, all together."""
    routes = {dialect.path for dialect in DIALECTS}

    def count(path: str, status: int) -> None:
        metrics.requests.labels(path if path in routes else "other", str(status)).inc()

    return count


class _Origins(CORSMiddleware):
    """Starlette's, whose refusals are OpenAI's error object as all are, and counted."""

    def __init__(self, app: ASGIApp, /, *, refused: Callable[[str, int], None], **allowed: Any) -> None:
        super().__init__(app, **allowed)
        self._refused = refused

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        self._refused("other", response.status_code)
        own = {"content-length", "content-type"}
        headers = {name: value for name, value in response.headers.items() if name not in own}
        body = RequestError(response.status_code, bytes(response.body).decode()).body()
        return JSONResponse(body, response.status_code, headers)


class _Failures:
    """A fault of ours is an answer like any other, with all headers. (Starlette's own handler stands outside of all that adds them.)"""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            if has_begun or scope["type"] != "http":
                raise
            _log.exception("a request failed")
            body = RequestError(500, "the server failed; its log says why").body()
            await JSONResponse(body, 500)(scope, receive, send)


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
    """/v1/models/ is /v1/models. (A redirect would not do: clients send a GET after a POST that is redirected.) But a browser
    is sent to a page's own address: its files stand beside it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if scope["type"] == "http":
            path = scope["path"].rstrip("/") or "/"
            surplus = len(scope["path"]) - len(path)
            if surplus and path in PAGES.values():
                app = RedirectResponse("../" * surplus + path[1:], 308)  # relative: right below any prefix
            scope = {**scope, "path": path}
        await app(scope, receive, send)


def _endpoint(
    dialect: Dialect,
    backend: Backend,
    metrics: GatewayMetrics,
    models: Sequence[str],
    limits: RequestLimits,
    access: Access,
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        logs_prompt = access.logs_prompts
        return await answer(dialect, backend, metrics, request, models, limits, logs_prompt=logs_prompt)

    return endpoint
