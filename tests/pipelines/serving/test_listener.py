"""The port that the process which serves opens, and its gateways, one after the other, at it. (With Ray Serve:
tests/pipelines/test_serve.py.)"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.serve import context

from llada.errors import UserError
from pipelines.serving import connection, listener
from pipelines.serving.admission import Admission
from pipelines.serving.gateway import Served
from pipelines.serving.limits import DEFAULT_LIMITS
from pipelines.serving.listener import ListeningGateway, Port, check_port, open_port, take_port, url_of
from pipelines.serving.routes import Access

REPOSITORY = Path(__file__).resolve().parents[3]
GREET = """
import sys
from pipelines.serving.listener import take_port
port = take_port(sys.argv[1])
print("listening", flush=True)
taken, _ = port.accept()
taken.sendall(b"hello")
"""


def address_of(port: Port) -> tuple[str, int]:
    host, number = port.url.removeprefix("http://").split(":")
    return host, int(number)


def test_a_port_is_its_owners_at_once_and_who_comes_waits_for_a_gateway() -> None:
    with open_port("127.0.0.1", 0) as port:
        host, number = address_of(port)
        with pytest.raises(
            UserError, match=rf"cannot listen on {host}:{number} \(.*in use\); choose another"
        ):
            check_port(host, number)
        with (
            socket.create_connection((host, number), timeout=60) as waiting,
            take_port(port.counter) as taken,
        ):
            taken.accept()[0].sendall(b"hello")
            assert waiting.recv(5) == b"hello"
    check_port(host, number)
    with pytest.raises(UserError, match=r"cannot listen on no\.such\.host\.invalid:80 \("):
        check_port("no.such.host.invalid", 80)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("my.host", "http://my.host:80"),
    ],
)
def test_what_listens_everywhere_is_found_here(host: str, url: str) -> None:
    assert url_of(host, 80) == url


def test_another_process_takes_the_port_for_as_long_as_it_is_open() -> None:
    with open_port("127.0.0.1", 0) as port:
        folder = Path(port.counter).parent
        assert folder.stat().st_mode & 0o077 == 0
        command = [sys.executable, "-c", GREET, port.counter]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as taker:
            assert taker.stdout is not None
            assert taker.stdout.readline() == "listening\n"
            with socket.create_connection(address_of(port), timeout=60) as client:
                assert client.recv(5) == b"hello"
            assert taker.wait(60) == 0
    assert not folder.exists()
    with pytest.raises(OSError, match="No such file"):
        take_port(port.counter)


class Nobody:
    """A handle of a deployment of which nothing is asked."""

    app_name, deployment_name = "llada", "Denoiser"
    canary = None

    def _init(self, **_: Any) -> None:
        """There is nothing to route."""

    def options(self, **_: Any) -> Nobody:
        return self


async def new_gateway(port: Port) -> ListeningGateway:
    admission = partial(Admission, max_queued=4, per_replica=2, retry_after_s=5)
    served = [Served("tiny", {}, Nobody())]
    made = ListeningGateway.__new__(ListeningGateway)
    await made.__init__(served, admission, 8, DEFAULT_LIMITS, Access(), None, counter=port.counter)  # type: ignore[misc]
    return made


def test_gateways_follow_each_other_and_no_request_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients on connections that they keep, and such as come anew each time, while two gateways make room for the next."""
    monkeypatch.setattr(context, "_get_global_client", lambda: None)
    monkeypatch.setattr(listener, "_LAST_CALL_S", 2.0)
    outcomes: Counter[str] = Counter()
    answered = [0] * 8

    async def ask(url: str, number: int) -> None:
        limits = httpx.Limits(max_keepalive_connections=number % 2)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
            while True:
                answer = await client.get("/v1/models")
                outcomes[f"{answer.status_code} {answer.headers.get('connection')}"] += 1
                answered[number] += 1

    async def until_all_are_served(tasks: list[asyncio.Task[None]]) -> None:
        """By the gateway that there is: an answer on its way may be of the one before."""
        before = [*answered]
        while any(now < then + 2 for now, then in zip(answered, before, strict=True)):
            assert not any(task.done() for task in tasks), [task for task in tasks if task.done()]
            await asyncio.sleep(0.01)

    @contextlib.asynccontextmanager
    async def asking(url: str) -> AsyncIterator[list[asyncio.Task[None]]]:
        tasks = [asyncio.create_task(ask(url, number)) for number in range(8)]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()

    async def follow(port: Port) -> None:
        gateway = await new_gateway(port)
        idle = socket.create_connection(address_of(port), timeout=30)  # who never asks is not waited for
        async with asking(port.url) as tasks:
            for _ in range(2):
                await until_all_are_served(tasks)
                before, gateway = gateway, await new_gateway(port)
                await before.close()
                with pytest.raises(RuntimeError, match="has ended"):
                    before.check_health()
            await until_all_are_served(tasks)
            gateway.check_health()
        idle.close()
        await gateway.close()

    with open_port("127.0.0.1", 0) as port:
        asyncio.run(asyncio.wait_for(follow(port), 180))
    assert outcomes.keys() == {"200 None", "200 close"}
    assert outcomes["200 close"] >= 8  # each client that keeps its connection was told of both ends


def test_a_gateway_bounds_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """As test_connection.py has it; so its end comes, too, whoever holds a connection."""
    monkeypatch.setattr(context, "_get_global_client", lambda: None)
    monkeypatch.setattr(listener, "_LAST_CALL_S", 0.2)
    monkeypatch.setattr(connection, "_HEAD_S", 1.0)
    monkeypatch.setattr(connection, "_UNREAD_S", 1.5)

    async def hold(port: Port) -> None:
        gateway = await new_gateway(port)
        writers = []

        async def ask(data: bytes) -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection(*address_of(port), limit=1 << 10)
            writers.append(writer)
            writer.write(data)
            return reader

        assert await (await ask(b"")).read() == b""
        head, _, body = (await (await ask(b"nonsense\r\n\r\n")).read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        await ask(b"")
        for _ in range(4):  # nobody reads the answers, which are more than the kernel takes
            writers[-1].write(b"GET /openapi.json HTTP/1.1\r\n\r\n" * 60)
            await asyncio.sleep(0.2)
        await gateway.close()
        for writer in writers:
            writer.transport.abort()

    with open_port("127.0.0.1", 0) as port:
        asyncio.run(asyncio.wait_for(hold(port), 120))


def test_a_gateway_counts_what_it_refuses_and_writes_it_down(
    monkeypatch: pytest.MonkeyPatch, access_lines: list[dict[str, Any]]
) -> None:
    """Each once: what is no request as a connection's, a body that cannot be read as its request's."""
    monkeypatch.setattr(context, "_get_global_client", lambda: None)
    tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    upload = b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    long = b"x" * connection.MAX_HEAD_BYTES

    async def refuse(port: Port) -> str:
        gateway = await new_gateway(port)

        async def ask(*parts: bytes) -> bytes:
            reader, writer = await asyncio.open_connection(*address_of(port))
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.1)
            answer = await reader.read()
            writer.close()
            return answer

        sent = [(tls,), (b"GET /" + long,), (upload, b"nonsense"), (upload + b"nonsense",)]
        answers = [await ask(*parts) for parts in sent]
        assert [answer.split()[1] for answer in answers] == [b"400", b"431", b"400", b"400"]
        metrics = await ask(b"GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n")
        await gateway.close()
        return metrics.decode()

    with open_port("127.0.0.1", 0) as port:
        metrics = asyncio.run(asyncio.wait_for(refuse(port), 120))
    counted = [line for line in metrics.splitlines() if line.startswith("llada_requests_total{")]
    assert sorted(counted) == [
        'llada_requests_total{route="/v1/completions",status="400"} 2.0',
        'llada_requests_total{route="other",status="400"} 1.0',
        'llada_requests_total{route="other",status="431"} 1.0',
    ]
    told = [(line["client"], line.get("path"), line["status"], line.get("reason")) for line in access_lines]
    assert told == [
        ("127.0.0.1", None, 400, "this is not HTTP/1.1"),
        ("127.0.0.1", None, 431, "the request's line and headers have more than 65,536 bytes"),
        *[("127.0.0.1", "/v1/completions", 400, None)] * 2,
    ]
