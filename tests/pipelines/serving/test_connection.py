"""What clients do to a connection of the endpoint's own port, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import uvicorn
import uvloop

from llada import __version__
from pipelines.serving import connection
from pipelines.serving.connection import MAX_HEAD_BYTES, Connection, look_after

LARGE = b"x" * (16 << 20)  # more than the kernel takes for a client that does not read
HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
UPLOAD = b"POST /upload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
ECHO = b"POST /echo HTTP/1.1\r\nHost: x\r\n"
# As curl and Java's client make it, and as browsers do.
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
WEBSOCKET = (
    b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)


class Application:
    """/wait answers when it is told to or its client has left, /upload once its body is there, /echo with its body, others at
    once."""

    def __init__(self) -> None:
        self.waiting, self.left, self.uploads, self.bodies = 0, 0, 0, 0
        self.headers: list[tuple[bytes, bytes]] = []  # of the last /echo
        self.refused: list[int] = []  # what it has not heard of
        self.may_answer = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = LARGE if scope["path"] == "/large" else scope["path"].encode()
        if scope["path"] == "/upload":
            self.uploads += 1
            while (message := await receive()).get("more_body"):
                pass
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            self.bodies += 1
        elif scope["path"] == "/echo":
            body, more, self.headers = b"", True, scope["headers"]
            while more:
                message = await receive()
                body, more = body + message["body"], message["more_body"]
        elif scope["path"] == "/wait":
            await receive()  # the body
            self.waiting += 1
            leaving = asyncio.create_task(receive())
            told = asyncio.create_task(self.may_answer.wait())
            await asyncio.wait({leaving, told}, return_when=asyncio.FIRST_COMPLETED)
            self.waiting -= 1
            self.left += leaving.done()
            leaving.cancel()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Client:
    """A socket to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next one."""
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 60)).decode()
        status, *lines = head.strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), 60)
        return int(status.split()[1]), headers, body

    async def is_closed(self) -> bool:
        """Waits until it is; whether nothing more has come."""
        try:
            return await asyncio.wait_for(self.reader.read(1), 60) == b""
        except ConnectionError:
            return True


Connect = Callable[[], Awaitable[Client]]
Steps = Callable[[Connect, Application, set[Any]], Awaitable[None]]


def at_a_server(steps: Steps) -> None:
    """Run `steps` with a way to connect to a server, its application and its connections."""

    async def run() -> None:
        async with asyncio.timeout(120), contextlib.AsyncExitStack() as stack:
            application = Application()
            protocol = partial(Connection, refused=application.refused.append)
            settings: dict[str, Any] = {"http": protocol, "ws": "none", "lifespan": "off"}
            config = uvicorn.Config(application, host="127.0.0.1", port=0, log_level="critical", **settings)
            server = uvicorn.Server(config)
            connections = server.server_state.connections
            serving = asyncio.create_task(server.serve())
            looking = asyncio.create_task(look_after(connections, every_s=0.02))
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]

            async def connect() -> Client:
                raw = socket.socket()
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
                raw.setblocking(False)
                await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
                client = Client(*await asyncio.open_connection(sock=raw, limit=1 << 20))
                stack.callback(client.writer.transport.abort)
                return client

            try:
                await steps(connect, application, connections)
            finally:
                application.may_answer.set()
                server.should_exit = True
                await asyncio.wait_for(serving, 60)
                looking.cancel()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # Ray's processes have it
        runner.run(run())


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.01)


def error_of(answer: tuple[int, dict[str, str], bytes], status: int) -> str:
    """The message of a refusal in the form of OpenAI's."""
    assert answer[0] == status
    assert answer[1]["content-type"] == "application/json"
    assert answer[1]["llada-version"] == __version__
    error = json.loads(answer[2])["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error["message"]


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"A: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
        HEAD + b"A: b\r\n" * MAX_HEAD_BYTES,
        HEAD + b"A: " + b"x" * (40 << 20),
        HEAD + b"Connection: Upgrade\r\nUpgrade: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n",
        UPLOAD + b"1\r\nx\r\n0\r\nA: " + b"x" * (4 << 20),
        UPLOAD + b"1;" + b"x" * (4 << 20),
    ],
    ids=["one", "many", "endless", "offer", "line", "trailer", "chunk"],
)
def test_a_long_head_is_refused_whatever_it_is_made_of(
    access_lines: list[dict[str, Any]], data: bytes
) -> None:
    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        client = await connect()
        sending = asyncio.create_task(client.send(data))
        assert "more than 65,536 bytes" in error_of(await client.answer(), 431)
        assert await client.is_closed()
        sending.cancel()
        client.writer.transport.abort()
        await until(lambda: not connections)
        assert application.bodies == 0
        assert application.refused == refusals(data, 431, access_lines)

    at_a_server(steps)


def refusals(data: bytes, status: int, lines: list[dict[str, Any]]) -> list[int]:
    """What is counted beside the application's own requests, for each of which there is a line: a body is of one of these."""
    if data.startswith(UPLOAD):
        assert lines == []
        return []
    (line,) = lines
    assert line.keys() == {"time", "client", "status", "reason"}
    assert (line["client"], line["status"]) == ("127.0.0.1", status)
    return [status]


def test_heads_and_bodies_of_good_size_are_taken_however_they_come() -> None:
    """Long heads, letter by letter, several on one connection, and a body of many small chunks with a trailer."""

    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        client = await connect()
        for _ in range(3):
            await client.send(HEAD + b"A: " + b"x" * 60_000 + b"\r\n\r\n")
            assert (await client.answer())[0] == 200
        for place in range(len(HEAD)):
            await client.send(HEAD[place : place + 1])
            await asyncio.sleep(0)
        await client.send(b"\r\n")
        assert (await client.answer())[0] == 200
        await client.send(UPLOAD + b"1\r\nx\r\n" * 50_000 + b"0\r\nA: b\r\n\r\n")
        assert (await client.answer())[::2] == (200, b"/upload")

    at_a_server(steps)


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http:// HTTP/1.1\r\n\r\n",
        HEAD + b"Content-Length: x\r\n\r\n",
        UPLOAD + b"no number\r\n",
    ],
    ids=["words", "TLS", "version", "target", "length", "chunk"],
)
def test_what_is_no_http_is_refused_as_everything_else_is(
    monkeypatch: pytest.MonkeyPatch, access_lines: list[dict[str, Any]], data: bytes
) -> None:
    monkeypatch.setattr(connection, "_LINGER_S", 0.1)

    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        client = await connect()
        await client.send(data)
        assert error_of(await client.answer(), 400) == "this is not HTTP/1.1"
        assert await client.is_closed()
        await until(lambda: not connections)
        assert application.refused == refusals(data, 400, access_lines)

    at_a_server(steps)


def test_nonsense_behind_a_body_that_was_not_wanted_is_refused() -> None:
    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        client = await connect()
        await client.send(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n")
        assert (await client.answer())[0] == 200
        await client.send(b"hi")
        await client.send(b"nonsense\r\n\r\n")
        assert error_of(await client.answer(), 400) == "this is not HTTP/1.1"
        assert application.refused == [400]

    at_a_server(steps)


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", b"GET http:// HTTP/1.1\r\n\r\n"])
def test_nonsense_behind_a_request_is_no_part_of_its_answer(data: bytes) -> None:
    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        client = await connect()
        await client.send(b"GET /wait HTTP/1.1\r\n\r\n")
        await until(lambda: application.waiting == 1)
        await client.send(data)
        await asyncio.sleep(0.1)
        application.may_answer.set()
        assert (await client.answer())[::2] == (200, b"/wait")
        assert await client.is_closed()
        assert application.refused == [400]

    at_a_server(steps)


def test_a_head_has_its_time_and_a_body_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        second, uploading = [await connect() for _ in range(2)]
        await second.send(HEAD + b"\r\n")
        assert (await second.answer())[0] == 200
        await uploading.send(UPLOAD)
        await until(lambda: application.uploads == 1)
        monkeypatch.setattr(connection, "_HEAD_S", 0.3)
        silent, slow = [await connect() for _ in range(2)]

        async def drip(client: Client) -> None:
            with contextlib.suppress(ConnectionError):
                await client.send(HEAD)
                while True:
                    await client.send(b"A: b\r\n")
                    await asyncio.sleep(0.05)

        dripping = [asyncio.create_task(drip(client)) for client in (slow, second)]
        for client in (silent, slow, second):
            assert await client.is_closed()
        for task in dripping:
            task.cancel()
        await uploading.send(b"1\r\nx\r\n0\r\n\r\n")
        assert (await uploading.answer())[0] == 200

    at_a_server(steps)


def test_who_reads_nothing_is_let_go_and_who_reads_slowly_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_UNREAD_S", 2.0)

    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        asks = b"GET /large HTTP/1.1\r\n\r\n"
        clients = [await connect() for _ in range(4)]
        closing, keeping, several, slow = clients
        await closing.send(b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n")
        await keeping.send(asks)
        await several.send(asks * 3)
        await slow.send(asks)
        begun = time.monotonic()
        while len(connections) > 1 or time.monotonic() - begun < 3:
            await asyncio.sleep(0.1)
            await slow.reader.read(1 << 18)  # a sixty-fourth of it
        (left,) = connections
        assert left.client == slow.writer.get_extra_info("sockname")

    at_a_server(steps)


def test_who_leaves_with_more_requests_behind_the_first_is_noticed() -> None:
    """In one piece, and one after the other."""

    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        wait = b"GET /wait HTTP/1.1\r\n\r\n"
        for count, parts in enumerate(([wait + HEAD + b"\r\n"], [wait] * 3), start=1):
            client = await connect()
            for part in parts:
                await client.send(part)
                await until(lambda: application.waiting == 1)
                await asyncio.sleep(0.05)
            client.writer.close()
            await until(lambda count=count: application.left == count)  # type: ignore[misc]
            await until(lambda: not connections)
            assert application.waiting == 0

    at_a_server(steps)


@pytest.mark.parametrize("offer", [b"", H2C], ids=["plain", "offer"])
def test_requests_ahead_are_answered_in_their_order_and_have_a_limit(
    monkeypatch: pytest.MonkeyPatch, access_lines: list[dict[str, Any]], offer: bytes
) -> None:
    monkeypatch.setattr(connection, "_MAX_AHEAD", 3)

    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        few, many = await connect(), await connect()
        ahead = b"".join(b"GET /%d HTTP/1.1\r\n%s\r\n" % (number, offer) for number in range(3))
        for client, data in ((few, ahead), (many, ahead + HEAD + b"\r\n")):
            await client.send(b"GET /wait HTTP/1.1\r\n" + offer + b"\r\n")
            await until(lambda client=client: application.waiting == 1 + (client is many))  # type: ignore[misc]
            await client.send(data)
        await asyncio.sleep(0.1)
        application.may_answer.set()
        assert [(await few.answer())[2] for _ in range(4)] == [b"/wait", b"/0", b"/1", b"/2"]
        assert (await many.answer())[2] == b"/wait"
        assert await many.is_closed()
        assert application.refused == [400]
        assert [line["reason"] for line in access_lines] == [
            "more than 64 requests are sent ahead of their answers"
        ]

    at_a_server(steps)


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_an_upgrade_is_not_made_and_its_request_answered(offer: bytes, is_chunked: bool) -> None:
    """Wherever the packets end; and a body is a body, also one that could be a request."""

    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        body = HEAD + b"\r\n"
        if is_chunked:
            head = b"Transfer-Encoding: chunked\r\n\r\n"
            sent = b"%x\r\n%s\r\n0\r\nA: b\r\n\r\n" % (len(body), body)
        else:
            head, sent = b"Content-Length: %d\r\n\r\n" % len(body), body
        head = ECHO + offer + head
        data = head + sent + HEAD + offer + b"\r\n" + UPLOAD + b"1\r\nx\r\n0\r\n\r\n"
        places = [*range(1, len(data))]
        for cuts in ([], [len(head)], [len(head) - 1], [len(head) + len(sent)], places):
            client = await connect()
            for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                await client.send(data[begin:end])
                await asyncio.sleep(0.001 if len(cuts) > 1 else 0.05)
            answers = [(await client.answer())[::2] for _ in range(3)]
            assert answers == [(200, body), (200, b"/"), (200, b"/upload")], cuts
            assert not [name for name, _ in application.headers if name == b"upgrade"]
        assert application.refused == []

    at_a_server(steps)


def test_beside_its_offer_a_request_is_as_it_came() -> None:
    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        more = b"Connection: close\r\nA: b: c\r\na: \xff \x09d\r\nEmpty:\r\nExpect: 100-continue\r\n"
        for version, headers in ((b"1.1", more), (b"1.0", b"")):
            client = await connect()
            head = ECHO.replace(b"1.1", version) + H2C + headers + b"Content-Length: 2\r\n\r\n"
            await client.send(head)
            if headers:
                assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send(b"hi")
            status, told, body = await client.answer()
            assert (status, told["connection"], body) == (200, "close", b"hi")
            assert await client.is_closed()
            lines = [line.partition(b":") for line in head.split(b"\r\n")[1:-2]]
            assert application.headers == [
                (name.lower(), value.lstrip()) for name, _, value in lines if name != b"Upgrade"
            ]

    at_a_server(steps)


@pytest.mark.parametrize("offer", [b"", H2C], ids=["plain", "offer"])
def test_a_tunnel_is_refused(offer: bytes) -> None:
    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        client = await connect()
        await client.send(b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n" + offer + b"\r\n" + HEAD + b"\r\n")
        assert error_of(await client.answer(), 400) == "CONNECT is for proxies, and this is none"
        assert await client.is_closed()
        assert application.refused == [400]

    at_a_server(steps)


CURL = shutil.which("curl")
KNOWS_HTTP2 = CURL and b"HTTP2" in subprocess.run([CURL, "--version"], capture_output=True, check=True).stdout


@pytest.mark.skipif(not KNOWS_HTTP2, reason="there is no curl with HTTP/2")
@pytest.mark.parametrize("body", [b'{"prompt": "Go"}', b"x" * (3 << 20)], ids=["short", "long"])
def test_curls_offer_of_http2(body: bytes) -> None:
    async def steps(connect: Connect, application: Application, connections: set[Any]) -> None:
        host, port = (await connect()).writer.get_extra_info("peername")
        command = [str(CURL), "--http2", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60"]
        told = ["--data-binary", "@-", "--write-out", " HTTP/%{http_version} %{http_code}"]
        curl = await asyncio.create_subprocess_exec(
            *command, *told, f"http://{host}:{port}/echo", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        out, _ = await curl.communicate(body)
        assert out == body + b" HTTP/1.1 200"
        assert dict(application.headers)[b"http2-settings"]  # it was one

    at_a_server(steps)
