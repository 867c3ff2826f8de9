"""A line of JSON for each request: who asked what, what it took, how it ended. No text of prompts or replies unless asked.

A handler adds what it knows to `notes(request)`; what is written when is the middleware's.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.errors import shorten

access_log = logging.getLogger("llada.access")
REQUEST_ID = "x-request-id"
_MAX_ID = 128
# W3C Trace Context, level 1: version, trace id, parent id, flags; later versions may append fields.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
# Asked every few seconds by machines: a line only when they fail.
_QUIET = ("/health", "/metrics")


@dataclass(frozen=True, slots=True)
class RequestIds:
    """By what a request is found again in other processes' logs."""

    request_id: str
    traceparent: str | None = None
    """Of W3C Trace Context, as the client has sent it; None: nothing, or nothing valid."""

    @property
    def trace_id(self) -> str | None:
        return self.traceparent and self.traceparent.split("-")[1]


def ids_of(request: Request) -> RequestIds:
    ids: RequestIds = request.scope["state"]["ids"]
    return ids


def notes(request: Request) -> dict[str, Any]:
    """What else the request's line will say."""
    found: dict[str, Any] = request.scope["state"]["notes"]
    return found


def write_to_stdout() -> None:
    """Send the lines to this process's standard output, as they are; a second call changes nothing."""
    if not access_log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False


def write_refusal(client: str | None, status: int, reason: str) -> None:
    """The line of a connection on which nothing came that is a request. `reason`: a sentence without what has come."""
    _write(client=client, status=status, reason=reason)


def _write(**line: Any) -> None:
    """A line, with the time, of all that is known."""
    known = {name: value for name, value in line.items() if value is not None}
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    access_log.info("%s", json.dumps({"time": now, **known}, ensure_ascii=False))


class AccessLog:
    """ASGI middleware: gives the request its ids, and writes its line when the last byte of the answer is sent."""

    def __init__(self, app: ASGIApp, *, echoes_id: bool = True) -> None:
        """`echoes_id`: the answer carries x-request-id; False behind Ray, which does that itself."""
        self._app, self._echoes_id = app, echoes_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, headers = time.monotonic(), Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given[:_MAX_ID] or uuid.uuid4().hex
        traceparent = headers.get("traceparent", "").strip()
        ids = RequestIds(request_id, traceparent if _TRACEPARENT.fullmatch(traceparent) else None)
        noted: dict[str, Any] = {}
        scope.setdefault("state", {}).update(ids=ids, notes=noted)
        status = 499  # as nginx has it: the client was gone before it was answered

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._echoes_id:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            status = 500
            raise
        finally:
            if scope["path"] not in _QUIET or status >= 400:
                client = scope.get("client")
                line = {
                    "request_id": request_id,
                    "trace_id": ids.trace_id,
                    "client": client[0] if client else None,
                    "method": shorten(scope["method"]),
                    "path": shorten(scope["path"]),
                    "status": status,
                    "seconds": round(time.monotonic() - began, 4),
                }
                _write(**line | noted)
