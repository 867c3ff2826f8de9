"""One connection to the endpoint's own port: how much of this process a client may hold by it, and for how long.

uvicorn reads HTTP and calls the application. It bounds neither the head of a request nor the time for it, waits for ever for
clients that do not read, of requests that are sent ahead of their answers it tells only the last that the client has left, and
it loses the body of a request that offers to upgrade the connection.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from llada import __version__
from pipelines.serving.access_log import write_refusal
from pipelines.serving.errors import RequestError

MAX_HEAD_BYTES = 1 << 16
_MAX_AHEAD = 64  # requests that wait for the answer to the one before them
# From the first look at a connection without a request to the end of its request's head.
_HEAD_S = 30.0
# A client that takes nothing of its answer for so long does not read it.
_UNREAD_S = 60.0
# So long what a refused client still sends is read: it would not see the refusal of a connection that is closed before.
_LINGER_S = 2.0
# (status, message)
_MALFORMED = 400, "this is not HTTP/1.1"
_LONG_HEAD = 431, f"the request's line and headers have more than {MAX_HEAD_BYTES:,} bytes"
_FAR_AHEAD = 400, f"more than {_MAX_AHEAD} requests are sent ahead of their answers"
_NO_PROXY = 400, "CONNECT is for proxies, and this is none"


class Connection(HttpToolsProtocol):
    """uvicorn's, with bounds. `look` is to be called from time to time."""

    def __init__(self, config: Config, *args: Any, refused: Callable[[int], None], **kwargs: Any) -> None:
        """`refused` is told the status of what the application hears nothing of."""
        super().__init__(config, *args, **kwargs)
        self._refused = refused
        self._answering: RequestResponseCycle | None = None  # the other cycles wait in `pipeline`
        self._refusal = _MALFORMED  # of what comes next, should it not be taken
        self._is_refused = False
        self._reads_body = False  # that of `cycle`
        self._head_bytes = 0  # since the last whole head or piece of a body
        self._headless_since: float | None = None
        self._unread, self._unread_since = 0, self.loop.time()

    def look(self, now: float) -> None:
        """Close the connection if a client holds it without need. `now`: the event loop's time."""
        unread = self.transport.get_write_buffer_size()
        if not unread or unread < self._unread:
            self._unread_since = now
        self._unread = unread
        if now - self._unread_since > _UNREAD_S:
            self.transport.abort()
        # A connection on which nothing has come since an answer has uvicorn's time limit.
        elif (self.cycle is None or self.cycle.response_complete) and self.timeout_keep_alive_task is None:
            self._headless_since = self._headless_since or now
            if now - self._headless_since > _HEAD_S:
                self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._refuse(*self._refusal)
        if self._head_bytes > MAX_HEAD_BYTES and not self._is_refused:
            self._refuse(*_LONG_HEAD)

    def _parse(self, data: bytes) -> None:
        """httptools takes the offer to upgrade a connection (to HTTP/2, as curl and Java's client make it) for accepted, so that
        the body is no part of the request. Here it is ignored (RFC 9110, 7.8): the head is read again without it."""
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
                head = self._head_without_offer()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
                self.parser.feed_data(head)

    def _head_without_offer(self) -> bytes:
        """Of the request that has been read last. (Without the header Upgrade, the word in Connection means nothing.)"""
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _LONG_HEAD
        elif len(self.pipeline) >= _MAX_AHEAD:
            self._refusal = _FAR_AHEAD
        elif self.parser.get_method() == b"CONNECT":  # an upgrade without an offer
            self._refusal = _NO_PROXY
        if self._refusal is not _MALFORMED:
            raise ValueError(self._refusal)  # ends the parser's work, and is an HttpParserError then
        if self.parser.should_upgrade():
            return  # `_parse` comes again
        self._head_bytes, self._headless_since = 0, None
        super().on_headers_complete()
        self._reads_body = True
        if self.pipeline:
            self.flow.resume_reading()  # else it would not be noticed that the client leaves

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self._reads_body = False
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _refuse(self, status: int, message: str) -> None:
        """Read no further request. The one that is answered now, if there is one, is finished without a word in its middle."""
        self._is_refused = True
        answering = self._answering
        if answering is not None and answering is self.cycle and self._reads_body:
            if answering.response_started:
                self.transport.close()
                return
            # It is the application's: it counts this one, and writes the line of it.
            answering.scope["state"]["refusal"] = status, message
            _tell_of_end(answering)
        else:
            self._refused(status)
            write_refusal(self.client[0] if self.client else None, status, message)
            if answering is not None and not answering.response_complete:
                answering.keep_alive = False
                return
        body = json.dumps(RequestError(status, message).body()).encode()
        headers = [
            *self.server_state.default_headers,
            (b"llada-version", __version__.encode()),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", body]))
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answering is not None and not self._answering.response_complete:
            _tell_of_end(self._answering)
        super().connection_lost(exc)


def _tell_of_end(cycle: RequestResponseCycle) -> None:
    """The work for a request ends as its client has left."""
    cycle.disconnected = True
    cycle.message_event.set()


async def look_after(connections: set[Any], every_s: float = 1.0) -> None:
    """Look at these `Connection`s for ever."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(every_s)
        for connection in [*connections]:
            connection.look(loop.time())
