"""Fixtures shared by all tests: the shared data folder, one S3 server and one local Ray for the whole session."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from llada.data.tokens.manifest import load_dataset_entry, read_index, resolve_snapshot
from llada.files import join, sha256

REPOSITORY = Path(__file__).resolve().parents[1]
# Threads that wait for work sleep, here and in all that is started from here: several processes share few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A machine that has other things to do is no failure.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")
# In which order several processes take up the files; the others follow, those that start servers first.
LONGEST_FIRST = (
    "tests/pipelines/runners/test_workers.py",
    "tests/pipelines/test_prepare_corpus.py",
    "tests/test_readme.py",
    "tests/pipelines/test_quickstart.py",
)


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whoever uses a server is an integration test. On several processes (`make test`) what takes longest comes first."""
    for item in items:
        if not {"local_ray", "s3_gateway"}.isdisjoint(getattr(item, "fixturenames", ())):
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


class Gateway:
    """A TCP relay on the loopback to a server that can go away and come back at the same port."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.open()

    def open(self) -> None:
        """Let connections through."""
        self._server = self._call(asyncio.start_server(self._relay, "127.0.0.1", self.port))
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Refuse new connections and reset those there are."""
        self._call(self._abort())

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _abort(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(1 << 16):
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
def verify_shards() -> Callable[[str, str], None]:
    """verify_shards(url, split): all shards of a prepared folder are there, with the checksums that are listed."""

    def verify(url: str, split: str) -> None:
        snapshot = resolve_snapshot(url)
        root, index = join(snapshot, load_dataset_entry(snapshot).root), read_index(snapshot, split)
        checksums = zip(index["name"].to_pylist(), index["sha256"].to_pylist(), strict=True)
        changed = [name for name, expected in checksums if sha256(join(root, name)) != expected]
        assert not changed, changed

    return verify
