"""llada/files.py: places, and a store that goes away for a moment."""

from __future__ import annotations

import gzip
import threading
from pathlib import Path

import pytest

from llada.data.read.listing import list_inputs
from llada.files import exists, file_sizes, join, local_copy, open_text, read_bytes, write_bytes, writing


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
def test_a_store_that_is_away_for_a_moment_is_waited_for(s3_url, s3_gateway, tmp_path, monkeypatch):
    """Any call to it, without the repetitions of botocore, which are random and long."""
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    write_bytes(f"{s3_url}/away/a.jsonl", b"{}")
    (tmp_path / "list.txt").write_text(f"{s3_url}/away/a.jsonl")

    def read_text() -> bool:
        with open_text(f"{s3_url}/away/a.jsonl") as lines:
            return list(lines) == ["{}"]

    def copy() -> bool:
        with local_copy(f"{s3_url}/away/a.jsonl") as path:
            return Path(path).read_bytes() == b"{}"

    calls = (
        read_text,
        copy,
        lambda: write_bytes(f"{s3_url}/away/b", b"meanwhile"),
        lambda: read_bytes(f"{s3_url}/away/a.jsonl") == b"{}",
        lambda: exists(f"{s3_url}/away/a.jsonl"),
        lambda: file_sizes(f"{s3_url}/away")["a.jsonl"] == 2,
        lambda: [file.size for file in list_inputs([f"{s3_url}/away"])] == [2],
        lambda: [file.size for file in list_inputs([f"@{tmp_path}/list.txt"])] == [2],
    )
    for call in calls:
        s3_gateway.close()
        back = threading.Timer(1, s3_gateway.open)
        back.start()
        try:
            assert call() in (None, True)
        finally:
            back.join()
    assert read_bytes(f"{s3_url}/away/b") == b"meanwhile"
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(FileNotFoundError):  # that is no failure of the store
        read_bytes(f"{s3_url}/away/none")


@pytest.mark.integration
def test_what_is_being_written_is_there_only_when_it_is_complete(tmp_path, s3_url):
    for url in (f"{tmp_path}/folder/file", f"{s3_url}/writing/file"):
        with pytest.raises(RuntimeError), writing(url) as path:
            Path(path).write_bytes(b"half")
            raise RuntimeError
        assert file_sizes(url.removesuffix("/file")) == {}
        with writing(url) as path:
            Path(path).write_bytes(b"whole")
            assert not exists(url)
        assert read_bytes(url) == b"whole"
        assert file_sizes(url.removesuffix("/file")) == {"file": 5}


@pytest.mark.parametrize("place", ["{tmp_path}", "memory://copies"])
def test_texts_and_copies(tmp_path, place):
    url = place.format(tmp_path=tmp_path)
    write_bytes(f"{url}/a.txt.gz", gzip.compress("é\nb\n".encode()))
    with open_text(f"{url}/a.txt.gz") as lines:
        assert list(lines) == ["é\n", "b\n"]
    with local_copy(f"{url}/a.txt.gz") as path:
        assert gzip.decompress(Path(path).read_bytes()).decode() == "é\nb\n"
        assert path.startswith(str(tmp_path)) == (url == str(tmp_path))
    assert Path(path).exists() == (url == str(tmp_path))
    for opened in (open_text, local_copy):
        with pytest.raises(FileNotFoundError, match=r"no file at .*none"), opened(f"{url}/none"):
            pass
        with pytest.raises(FileNotFoundError, match=r"^ours$"), opened(f"{url}/a.txt.gz"):
            raise FileNotFoundError("ours")
