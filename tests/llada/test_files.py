"""llada/files.py: places, and a store that goes away for a moment."""

from __future__ import annotations

import gzip
import importlib.util
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from llada.data.read.listing import list_inputs
from llada.errors import UserError
from llada.files import (
    exists,
    fetch_ranges,
    file_sizes,
    filesystem,
    join,
    local_copy,
    open_text,
    read_bytes,
    safetensors_layout,
    write_bytes,
    writing,
)


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("s3://bucket/a/", "b"), "s3://bucket/a/b"),
        (("s3://b/a/", "/c", "d"), "s3://b/a/c/d"),
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


def test_a_url_that_cannot_be_opened_is_the_users_to_mend():
    with pytest.raises(UserError, match=r"^nfs-like://x/y: Protocol not known: nfs-like"):
        filesystem("nfs-like://x/y")
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(UserError, match=r"^gs://bucket/x: .*gcsfs"):
            filesystem("gs://bucket/x")


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


@pytest.mark.parametrize("root", ["local", "memory://files-ranges"])
def test_ranges_are_fetched_together_and_empty_ones_cost_nothing(root, tmp_path, monkeypatch):
    root = str(tmp_path) if root == "local" else root
    for name in "ab":
        write_bytes(join(root, name), name.encode() + b"0123456789")
    calls = []
    kind = type(fsspec.core.url_to_fs(root)[0])
    fetch = kind.cat_ranges
    monkeypatch.setattr(kind, "cat_ranges", lambda self, *a, **k: calls.append(a[0]) or fetch(self, *a, **k))
    ranges = [(join(root, "b"), 0, 2), (join(root, "a"), 5, 5), (join(root, "a"), 9, 99)]
    assert fetch_ranges(ranges) == [b"b0", b"", b"89"]
    assert [len(paths) for paths in calls] == [2]
    assert fetch_ranges([(join(root, "missing"), 3, 3)]) == [b""]
    assert fetch_ranges([]) == []
    assert len(calls) == 1
    with pytest.raises(FileNotFoundError):
        fetch_ranges([(join(root, "missing"), 0, 3)])


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 70_000), st.integers(0, 30_000)), max_size=12)
)
def test_ranges_that_share_a_request_come_apart_again(wanted):
    """Overlapping, nested, repeated, behind the end, in any order."""
    files = {name: np.random.default_rng(ord(name)).bytes(60_000) for name in "ab"}
    for name, data in files.items():
        write_bytes(f"memory://shared-requests/{name}", data)
    ranges = [(f"memory://shared-requests/{name}", start, start + length) for name, start, length in wanted]
    assert fetch_ranges(ranges) == [files[name][start : start + length] for name, start, length in wanted]


def test_neighbours_share_a_request_and_distant_ranges_do_not(monkeypatch):
    url = "memory://neighbours/a"
    write_bytes(url, bytes(20 << 20))
    asked = []
    memory = type(fsspec.filesystem("memory"))
    fetch = memory.cat_ranges
    monkeypatch.setattr(
        memory,
        "cat_ranges",
        lambda self, *a, **k: asked.extend(zip(a[1], a[2], strict=True)) or fetch(self, *a, **k),
    )
    fetch_ranges([(url, 40_000, 40_010), (url, 0, 10), (url, 16_000, 16_020), (url, 5, 8)])
    assert asked == [(0, 16_020), (40_000, 40_010)]
    asked.clear()
    fetch_ranges([(url, n << 20, (n + 1) << 20) for n in range(20)])  # a long stretch is read side by side
    assert asked == [(0, 8 << 20), (8 << 20, 16 << 20), (16 << 20, 20 << 20)]


def test_a_safetensors_header_says_where_its_tensors_lie():
    arrays = {"a": np.arange(6, dtype=np.uint32).reshape(2, 3), "b": np.array([7], dtype=np.uint64)}
    data = save(arrays, metadata={"format": "x"})
    metadata, places = safetensors_layout(data[:4096])
    assert metadata == {"format": "x"}
    assert (places["a"].dtype, places["a"].shape, places["b"].dtype) == ("U32", (2, 3), "U64")
    for name, place in places.items():
        assert data[place.start : place.end] == arrays[name].tobytes()
    assert safetensors_layout(save(arrays))[0] == {}
    for damaged in (data[:30], b"", b"\xff" * 100, (5).to_bytes(8, "little") + b"[1,2]"):
        with pytest.raises(ValueError, match="no safetensors header"):
            safetensors_layout(damaged)
