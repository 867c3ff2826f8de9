"""The endpoint's port on a Ray of our own, where no proxy stands before the gateway: it takes the connections itself.

The process that serves opens the port, and hands it over a Unix socket to whoever is its gateway. While one gateway makes room
for the next, both have it; and what none of them has taken yet waits at the port, which stays open.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import socket
import tempfile
import threading
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llada.errors import UserError
from pipelines.serving.gateway import Gateway
from pipelines.serving.routes import refusal_counter

# A connection on which nothing is asked for so long is closed, as Ray's proxy does it.
_KEEP_ALIVE_S = 90
# So long a gateway that makes room lets the next request of each connection come, and answers that it is the last.
_LAST_CALL_S = 10.0
# So long after the time of the last request its answer may still be on its way.
_LAST_BYTES_S = 60.0
_LOOK_EVERY_S = 0.05
_TAKE_TIMEOUT_S = 60.0
_BACKLOG = 2048  # connections that wait


@dataclass(frozen=True)
class Port:
    """A port that is open."""

    url: str
    """Where clients find it, on this machine."""
    counter: str
    """The path of the Unix socket at which it is handed out."""


@contextlib.contextmanager
def open_port(host: str, port: int) -> Iterator[Port]:
    """For a `with` block, a port at which who comes waits for a gateway, and which any process of this user on this machine that
    knows of it may take (`take_port`). Port 0: one that is free. Raises UserError."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(socket.socket(_family(host), socket.SOCK_STREAM))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((host, port))
            opened.listen(_BACKLOG)  # now, because until then others can bind it, too
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --port"
            ) from None
        # In /tmp, because a socket's path has 107 characters at the most; nobody else can look into the folder.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llada-port-", dir="/tmp"))
        counter = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        counter.bind(path := f"{folder}/port")
        counter.listen()
        is_over = threading.Event()
        thread = threading.Thread(target=_hand_out, args=(opened, counter, is_over), daemon=True)
        thread.start()
        try:
            yield Port(url_of(host, opened.getsockname()[1]), path)
        finally:
            is_over.set()
            counter.shutdown(socket.SHUT_RDWR)
            thread.join()


def check_port(host: str, port: int) -> None:
    """Raises UserError when nobody could listen there."""
    with open_port(host, port):
        pass


def url_of(host: str, port: int) -> str:
    """Of what listens there, from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _hand_out(port: socket.socket, counter: socket.socket, is_over: threading.Event) -> None:
    while not is_over.is_set():
        try:
            taker, _ = counter.accept()
        except OSError:  # it is over, or this process has too many files open for the moment
            is_over.wait(_LOOK_EVERY_S)
            continue
        with taker, contextlib.suppress(OSError):
            socket.send_fds(taker, [b"p"], [port.fileno()])


def take_port(counter: str) -> socket.socket:
    """Of a `Port`. Raises OSError when it is not open any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_TAKE_TIMEOUT_S)
        asking.connect(counter)
        _, found, *_ = socket.recv_fds(asking, 1, 1)
    if not found:
        raise ConnectionResetError("the process that had the port open has ended")
    return socket.socket(fileno=found[0])


class ListeningGateway(Gateway):
    """The gateway, with an HTTP server of its own instead of Ray Serve's."""

    async def __init__(self, *args: Any, counter: str) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """`counter`: of the `Port`. The others: of Gateway."""
        import uvicorn

        from pipelines.serving.connection import Connection, look_after

        super().__init__(*args)
        refused = functools.partial(refusal_counter(self._metrics), "other")
        self._door = _Door(self.__serve_build_asgi_app__())
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._door,
                http=cast("type[asyncio.Protocol]", functools.partial(Connection, refused=refused)),
                ws="none",
                access_log=False,
                log_config=None,
                log_level=logging.ERROR,
                timeout_keep_alive=_KEEP_ALIVE_S,
                backlog=_BACKLOG,
                # What is still open then is none that waits for an answer.
                timeout_graceful_shutdown=math.ceil(self._limits.seconds + _LAST_BYTES_S),
                lifespan="on",
            )
        )
        self._serving = asyncio.create_task(self._server.serve([take_port(counter)]))
        self._looking = asyncio.create_task(look_after(self._server.server_state.connections))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(_LOOK_EVERY_S)
        self.check_health()

    def check_health(self) -> None:
        """Ray Serve replaces the gateway when this raises."""
        if self._serving.done():
            raise RuntimeError("the gateway's HTTP server has ended") from self._serving.exception()

    def __del__(self) -> Awaitable[None] | None:
        """Ray Serve calls this, and awaits what it gives, when the gateway is to end."""
        is_serving = hasattr(self, "_serving") and not self._serving.done()
        return self.close() if is_serving else None

    async def close(self) -> None:
        """Leave what comes to the next gateway, if there is one; returns when all that has come is answered."""
        for each in self._server.servers:
            each.close()
        self._door.is_closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_CALL_S):
                while self._server.server_state.connections:
                    await asyncio.sleep(_LOOK_EVERY_S)
        self._server.should_exit = True
        await self._serving
        self._looking.cancel()


class _Door:
    """ASGI middleware: once it is closing, each answer says that it is the last of its connection."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self.is_closing = app, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def say(message: Message) -> None:
            if self.is_closing and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, receive, say)
