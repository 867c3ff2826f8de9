"""Fixtures shared by all tests: the shared data folder, one S3 server and one local Ray for the whole session."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import secrets
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml

from llada.data.tokens.manifest import load_dataset_entry, read_index, resolve_snapshot
from llada.files import join, sha256

REPOSITORY = Path(__file__).resolve().parents[1]
# Threads that wait for work sleep, here and in all that is started from here: several processes share few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# And processes that share them (`make test`) have a thread each, as Ray gives its workers one a CPU.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# What Ray waits for without a need, read by its processes. At its own 2 s between two looks at its workers, 3 attempts to
# start a replica, 10 s between two reports of its load or of its metrics and 30 s before it says that there is no room for
# one, tests that take seconds would mostly wait.
for _name, _value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_metrics_report_interval_ms": "2000",
    "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_SLOW_STARTUP_WARNING_S": "5",
    "RAY_SERVE_SLOW_STARTUP_WARNING_PERIOD_S": "5",
}.items():
    os.environ.setdefault(_name, _value)
# A machine that has other things to do is no failure.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")
# In which order several processes take up the files; the others follow, those that start servers first.
LONGEST_FIRST = (
    "tests/pipelines/test_serve.py",
    "tests/pipelines/runners/test_workers.py",
    "tests/pipelines/test_prepare_corpus.py",
    "tests/pipelines/serving/test_page_in_browser.py",
    "tests/pipelines/test_quickstart.py",
    "tests/llada/training/test_parallel.py",
    "tests/test_readme.py",
    "tests/test_doors.py",
    "tests/pipelines/stage/test_cluster.py",
)


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whoever uses a server is an integration test. On several processes (`make test`) what takes longest comes first."""
    for item in items:
        # An address of an object is another one in each process, and those of `make test` must collect the same names.
        assert " at 0x" not in item.nodeid, f"{item.nodeid}: give its parameters ids"
        if not {"local_ray", "s3_gateway", "ray_cluster"}.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.integration)

    def place(item: pytest.Item) -> tuple[int, bool]:
        file = item.nodeid.split("::")[0]
        rank = LONGEST_FIRST.index(file) if file in LONGEST_FIRST else len(LONGEST_FIRST)
        return rank, item.get_closest_marker("integration") is None

    if hasattr(config, "workerinput"):
        items.sort(key=place)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` with the development data: $LLADA_SHARED, or beside the repository."""
    folder = Path(os.environ.get("LLADA_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the development data: no folder {folder} (set LLADA_SHARED)")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Numbers from the official implementations (tests/golden/README.md)."""
    return REPOSITORY / "tests" / "golden"


def find_free_port() -> int:
    """One of the loopback at which nobody listens. Below those that a system gives to whoever asks for any (Linux from 32,768 on):
    of those, another process may be given it before it is taken."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """free_port() is a port for a server that is going to be started, or where there is to be none."""
    return find_free_port


class Gateway:
    """A TCP relay on the loopback to an HTTP server that can go away and come back at the same port.

    `requests`: made so far; `answered_bytes`: what came back, headers included.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.requests = self.answered_bytes = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = find_free_port()
        self.open()

    def open(self) -> None:
        """Let connections through."""
        self._server = self._call(asyncio.start_server(self._relay, "127.0.0.1", self.port))

    def close(self) -> None:
        """Refuse new connections and reset those there are."""
        self._call(self._abort())

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _abort(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(1 << 16):
                if sink is writer:
                    self.answered_bytes += len(data)
                else:  # a client writes the head of a request at once
                    self.requests += data.count(b" HTTP/1.1\r\n")
                sink.write(data)
                await sink.drain()
            sink.close()

        server_reader, server_writer = await asyncio.open_connection(*self._target)
        ends = {writer, server_writer}
        self._writers |= ends
        await asyncio.gather(copy(reader, server_writer), copy(server_reader, writer), return_exceptions=True)
        for end in ends:
            end.close()
        self._writers -= ends


# {folder: (status, code)} of what S3 answers.
S3_ANSWERS = {
    "denied": (403, "AccessDenied"),
    "wrong-key": (403, "InvalidAccessKeyId"),
    "expired": (400, "ExpiredToken"),
    "no-bucket": (404, "NoSuchBucket"),
    "moved": (301, "PermanentRedirect"),
}
REDIRECTS = {"redirect": "/plain/{name}", "circle": "/circle/{name}", "elsewhere": "ftp://nowhere/{name}"}


class WebServer(http.server.ThreadingHTTPServer):
    """A web server on the loopback whose folders each have a fault: /403/x is refused, /chunked/x tells no size.

    `files`: what a folder without a fault holds; `asked`: the requests so far.
    """

    files: dict[str, bytes]
    asked: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that stops reading is none of ours."""


class _WebHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.server.asked += 1
        self._drain()
        _, folder, *rest = self.path.split("?")[0].split("/")
        name = rest[-1] if rest else ""
        if folder in S3_ANSWERS:
            status, code = S3_ANSWERS[folder]
            text = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>"
            self._answer(status, text.encode(), {"x-amz-bucket-region": "eu-west-1"} if status == 301 else {})
        elif folder.isdigit():
            self._answer(int(folder), b"no")
        elif folder in REDIRECTS:
            self._answer(302, b"", {"Location": REDIRECTS[folder].format(name=name)})
        elif name not in self.server.files:
            self._answer(404, b"no")
        else:
            self._give(folder, self.server.files[name])

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def _give(self, folder: str, data: bytes) -> None:
        wanted = self.headers.get("Range")
        if folder == "chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if self.command == "GET":
                for start in range(0, len(data), 1 << 16):
                    piece = data[start : start + (1 << 16)]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")
        elif folder == "ranges" and wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            piece = data[int(first) : int(last) + 1 if last else None]
            place = f"bytes {first}-{int(first) + len(piece) - 1}/{len(data)}"
            self._answer(206, piece, {"Content-Range": place})
        elif folder == "cut":
            self._answer(200, data[: len(data) // 2], {"Content-Length": str(len(data))})
            self.close_connection = True
        else:
            self._answer(200, data)

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _drain(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))


@pytest.fixture
def web_server() -> Iterator[Callable[..., WebServer]]:
    """web_server(files) is a server that is running; with the paths of a (certificate, key) it speaks TLS."""
    servers: list[WebServer] = []

    def start(files: dict[str, bytes], certificate: tuple[str, str] | None = None) -> WebServer:
        server = WebServer(("127.0.0.1", 0), _WebHandler)
        server.files = files
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def s3_gateway() -> Iterator[Gateway]:
    """A real HTTP server (moto) on the loopback behind a gateway; the environment points s3fs at it, here and in Ray."""
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    gateway = Gateway(*server.get_host_and_port())
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{gateway.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()
    yield gateway
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="session")
def s3_url(s3_gateway: Gateway) -> str:
    """A bucket."""
    import s3fs

    s3fs.S3FileSystem().mkdir("llada-test")
    return "s3://llada-test"


@pytest.fixture(scope="session")
def local_ray(s3_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Ray with two CPUs for the session, started as every stage starts it; yields its log file."""
    from pipelines.stage.cluster import ClusterConfig, connect

    with connect(ClusterConfig(num_cpus=2), tmp_path_factory.mktemp("ray")) as log:
        yield log


@pytest.fixture(scope="session")
def scrape(local_ray: Path) -> Callable[..., dict[str, float]]:
    """scrape(*names, **labels) is {name: the last value} of what this Ray tells Prometheus with these labels, as soon as all of the
    names have been among it."""
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    def get(*names: str, **labels: str) -> dict[str, float]:
        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        deadline, said = time.monotonic() + 240, dict[str, float]()
        while True:
            text = ""
            with contextlib.suppress(urllib.error.URLError):  # Ray's agent may not be there yet
                text = urllib.request.urlopen(url, timeout=30).read().decode()
            # What has not been reported anew for twice the interval is left out, on a busy machine now this and now that.
            said |= {
                sample.name: sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if labels.items() <= sample.labels.items()
            }
            if set(names) <= said.keys():
                return said
            assert time.monotonic() < deadline, set(names) - said.keys()
            time.sleep(0.5)

    return get


@pytest.fixture(scope="session")
def metrics_shown() -> Callable[[str], set[str]]:
    """metrics_shown(prefix): the names of that prefix in the queries of all dashboards and alerts."""
    from promql_parser import VectorSelector, parse

    folder = REPOSITORY / "infra" / "monitoring"
    queries = [
        rule["expr"]
        for group in yaml.safe_load((folder / "alerts.yaml").read_text())["spec"]["groups"]
        for rule in group["rules"]
    ]
    for path in (folder / "dashboards").glob("*.json"):
        dashboard = json.loads(path.read_text())
        queries += [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
        for variable in dashboard["templating"]["list"][1:]:
            queries.append(variable["query"].removeprefix("label_values(").split(",")[0])

    def names_in(node: Any) -> Iterator[str]:
        if isinstance(node, VectorSelector):
            yield node.name
        for child in ("lhs", "rhs", "expr", "vector_selector", "args", "param"):
            below = getattr(node, child, None)
            for one in below if isinstance(below, list) else [below]:
                if one is not None and not isinstance(one, str):
                    yield from names_in(one)

    names = {name for query in queries for name in names_in(parse(query))}
    return lambda prefix: {name for name in names if name.startswith(prefix)}


@pytest.fixture(scope="session")
def verify_shards() -> Callable[[str, str], None]:
    """verify_shards(url, split): all shards of a prepared folder are there, with the checksums that are listed."""

    def verify(url: str, split: str) -> None:
        snapshot = resolve_snapshot(url)
        root, index = join(snapshot, load_dataset_entry(snapshot).root), read_index(snapshot, split)
        checksums = zip(index["name"].to_pylist(), index["sha256"].to_pylist(), strict=True)
        changed = [name for name, expected in checksums if sha256(join(root, name)) != expected]
        assert not changed, changed

    return verify
