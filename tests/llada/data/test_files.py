"""llada/data/files.py: places, and a store that goes away for a moment."""

from __future__ import annotations

import threading

import pytest

from llada.data.files import join, read_bytes, write_bytes


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("s3://bucket/a/", "b"), "s3://bucket/a/b"),
        (
            ("s3://bucket/data/snapshots/0001", "../0000/train.parquet"),
            "s3://bucket/data/snapshots/0000/train.parquet",
        ),
        (("s3://bucket/data/snapshots/0001", "../..", "train/x"), "s3://bucket/data/train/x"),
        (("/a/b", "../c"), "/a/c"),
        (("a", "."), "a"),
    ],
)
def test_join(parts, joined):
    assert join(*parts) == joined


@pytest.mark.integration
def test_a_store_that_is_away_for_a_moment_is_waited_for(monkeypatch):
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    s3fs = pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    again = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    try:
        s3fs.S3FileSystem().mkdir("llada-away")
        write_bytes("s3://llada-away/a", b"before")
        server.stop()
        threading.Timer(3, again.start).start()
        write_bytes("s3://llada-away/b", b"meanwhile")
        assert read_bytes("s3://llada-away/a") == b"before"
        assert read_bytes("s3://llada-away/b") == b"meanwhile"
    finally:
        again.stop()
        s3fs.S3FileSystem.clear_instance_cache()
