import dataclasses
import json
import pickle

import fsspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from llada.data.tokens.manifest import ShardError, write_index
from llada.data.tokens.packing import concatenate_and_cut, one_per_row
from llada.data.tokens.shards import (
    UNIGRAM_COUNTS,
    TokenDataset,
    load_unigram_counts,
    write_shard,
    write_unigram_counts,
)
from llada.files import join, write_bytes


def write_dataset(url: str, kind: str, shards: list, row_length: int = 8, **more: object) -> None:
    entries = [write_shard(url, "train", str(i), rows) for i, rows in enumerate(shards)]
    dataset = {
        "kind": kind,
        "row_length": row_length,
        "splits": {"train": {"indexes": ["train.parquet"]}},
        **more,
    }
    write_index(join(url, "train.parquet"), entries)
    write_bytes(join(url, "manifest.json"), json.dumps({"stage": "prepare", "dataset": dataset}).encode())


def document(start, length):
    return np.arange(start, start + length, dtype=np.uint32)


SHARDS = [
    concatenate_and_cut([document(100, 5), document(200, 9), document(300, 1)], 8, 0),
    concatenate_and_cut([document(70_000, 3)], 8, 0),
    concatenate_and_cut([document(4_000_000_000, 16)], 8, 0),
]


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    yield str(tmp_path / "data") if request.param == "local" else "memory://shards-test"
    fsspec.filesystem("memory").store.clear()


def test_shard_file_is_plain_safetensors(tmp_path):
    shard = write_shard(str(tmp_path), "train", "a", SHARDS[0])
    assert (shard.split, shard.name) == ("train", "train/a.safetensors")
    stored = load_file(tmp_path / "train/a.safetensors")
    assert stored["tokens"].dtype == np.uint32
    assert stored["segments"].tolist() == [[0, 0, 5], [5, 5, 8], [0, 0, 6], [6, 6, 7]]
    assert stored["segment_offsets"].tolist() == [0, 2, 4]
    assert (shard.rows, shard.tokens) == (2, 15)
    assert shard.bytes == (tmp_path / "train/a.safetensors").stat().st_size
    again = write_shard(str(tmp_path), "train", "b", SHARDS[0])
    assert again == dataclasses.replace(shard, name="train/b.safetensors")
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["a.safetensors", "b.safetensors"]


def test_rows_in_any_order(url):
    write_dataset(url, "pretrain", SHARDS)
    data = TokenDataset(url)
    assert (len(data), data.row_length, data.kind) == (5, 8, "pretrain")
    rows = data.rows(np.array([4, 1, 2, 1]))
    assert rows.tokens.dtype == np.int64
    assert rows.tokens[0].tolist() == list(range(4_000_000_008, 4_000_000_016))
    assert rows.tokens[1].tolist() == [203, 204, 205, 206, 207, 208, 300, 0]
    assert rows.segment_ids[1].tolist() == [0, 0, 0, 0, 0, 0, 1, -1]
    assert rows.maskable[1].tolist() == [True] * 7 + [False]
    assert rows.lengths.tolist() == [8, 7, 3, 7]
    assert data.lengths(np.array([1, 2])).tolist() == [7, 3]
    assert data.rows(np.array([], dtype=np.int64)).tokens.shape == (0, 8)
    with pytest.raises(IndexError, match=r"0\.\.4"):
        data.rows(np.array([5]))


@pytest.mark.parametrize(("passes", "epochs_to_see_all"), [(0.4, 3), (0.1, 10), (2.5, 1), (1.0, 1)])
def test_epochs_of_a_part_of_a_source_come_round_to_all_of_it(tmp_path, passes, epochs_to_see_all):
    stored = [concatenate_and_cut([document(8 * row, 8)], 8, 0) for row in range(10)]
    write_dataset(str(tmp_path), "pretrain", stored, epochs={"": passes})
    data = TokenDataset(str(tmp_path))
    assert len(data) == round(10 * passes)
    seen: set[int] = set()
    for epoch in range(epochs_to_see_all):
        indices = np.arange(len(data))
        rows = data.rows(indices, epochs=np.full(len(data), epoch)).tokens[:, 0] // 8
        times = np.bincount(rows, minlength=10)
        assert times.max() - times.min() <= 1  # none is favoured inside an epoch
        seen.update(rows.tolist())
    assert seen == set(range(10))


def test_sft_rows_count_the_padding_as_answer(url):
    write_dataset(url, "sft", [one_per_row([([5, 6, 7, 8], 2), ([9, 1], 1)], 8, pad_id=1)])
    data = TokenDataset(url)
    rows = data.rows(np.array([1, 0]), pad_to=5)
    assert rows.tokens.tolist() == [[9, 1, 1, 1, 1], [5, 6, 7, 8, 1]]
    assert rows.maskable.tolist() == [[False, True, True, True, True], [False, False, True, True, True]]
    assert not rows.segment_ids.any()
    assert rows.lengths.tolist() == [2, 4]
    assert data.rows(np.array([0])).tokens.shape == (1, 8)
    for bad in (3, 9):
        with pytest.raises(ValueError, match=f"pad_to={bad}"):
            data.rows(np.array([0]), pad_to=bad)


def test_a_batch_of_remote_rows_is_one_request_call(monkeypatch):
    write_dataset("memory://one-call", "pretrain", SHARDS)
    data = TokenDataset("memory://one-call")
    data.rows(np.arange(5))
    calls = []
    memory = type(fsspec.filesystem("memory"))
    original = memory.cat_ranges
    monkeypatch.setattr(
        memory, "cat_ranges", lambda self, *a, **k: calls.append(len(a[0])) or original(self, *a, **k)
    )
    data.rows(np.array([4, 0, 2]))
    assert calls == [3]


def test_fingerprint_changes_with_content_and_order(tmp_path):
    for name, shards in {"a": SHARDS, "b": SHARDS, "c": SHARDS[::-1]}.items():
        write_dataset(str(tmp_path / name), "pretrain", shards)
    a, b, c = (TokenDataset(str(tmp_path / name)).fingerprint for name in "abc")
    assert a == b != c


def test_a_dataset_travels_to_another_process(tmp_path):
    write_dataset(str(tmp_path), "pretrain", SHARDS)
    data = TokenDataset(str(tmp_path))
    data.rows(np.arange(5))
    copied = pickle.dumps(data)
    assert len(copied) < 1000
    assert len(pickle.loads(copied)) == 5


def test_errors_name_the_file_and_the_remedy(tmp_path, verify_shards):
    url = str(tmp_path)
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        TokenDataset(url)
    write_dataset(url, "pretrain", SHARDS)
    verify_shards(url, "train")
    with pytest.raises(ShardError, match="no split 'test'; it has train"):
        TokenDataset(url, "test")
    with pytest.raises(ValueError, match="pad_to is for SFT"):
        TokenDataset(url).rows(np.array([0]), pad_to=4)
    path = tmp_path / "train/1.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-8])
    with pytest.raises(ShardError, match=r"1\.safetensors has \d+ bytes instead of \d+; delete it"):
        TokenDataset(url).rows(np.array([2]))
    path.write_bytes(b"\xff" * len(good))
    with pytest.raises(ShardError, match=r"1\.safetensors is no llada-tokens-1 shard"):
        TokenDataset(url).rows(np.array([2]))
    path.write_bytes(good[:-1] + b"\xff")
    with pytest.raises(AssertionError, match=r"train/1\.safetensors"):
        verify_shards(url, "train")
    path.unlink()
    with pytest.raises(ShardError, match="missing shard"):
        TokenDataset(url).rows(np.array([2]))
    assert TokenDataset(url).rows(np.array([0])).lengths.tolist() == [8]  # the others can still be read


def test_unigram_counts_are_read_back_or_named(url):
    write_dataset(url, "pretrain", SHARDS)
    with pytest.raises(ShardError, match=f"{UNIGRAM_COUNTS} is missing"):
        load_unigram_counts(url)
    write_unigram_counts(url, np.arange(5))
    assert load_unigram_counts(url).tolist() == [0, 1, 2, 3, 4]
    for damaged in (b"", b"no numbers"):
        write_bytes(join(url, UNIGRAM_COUNTS), damaged)
        with pytest.raises(ShardError, match=f"{UNIGRAM_COUNTS} is damaged"):
            load_unigram_counts(url)
