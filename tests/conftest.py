"""Fixtures shared by all tests: the shared data folder, one S3 server and one local Ray for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` with the development data: $LLADA_SHARED, or beside the repository."""
    folder = Path(os.environ.get("LLADA_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the development data: no folder {folder} (set LLADA_SHARED)")
    return folder


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """A bucket on a real HTTP server (moto) on the loopback; the environment points s3fs at it, here and in Ray."""
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("llada-test")
    yield "s3://llada-test"
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="session")
def local_ray(s3_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Ray with two CPUs for the session, started as every stage starts it; yields its log file."""
    from pipelines.cluster import ClusterConfig, connect

    with connect(ClusterConfig(num_cpus=2), tmp_path_factory.mktemp("ray")) as log:
        yield log
