import dataclasses
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

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
from llada.files import filesystem, join, read_bytes, write_bytes
from llada.store_errors import StoreError


def write_dataset(
    url: str, kind: str, shards: list, row_length: int = 8, list_lengths: tuple = (), **more: object
) -> None:
    """`list_lengths`: the shards whose lengths are listed."""
    entries = [
        write_shard(url, "train", str(i), rows, list_lengths=i in list_lengths)
        for i, rows in enumerate(shards)
    ]
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


EXAMPLES = [
    one_per_row([([5, 6, 7, 8], 2), ([9, 1], 1)], 8, pad_id=1),
    one_per_row([([5], 0)], 8, pad_id=1),
    one_per_row([([2] * 8, 3), ([7] * 5, 1)], 8, pad_id=1),
]


@pytest.fixture
def requests(monkeypatch) -> list[int]:
    """How many ranges each call to the store "memory" asks for."""
    calls: list[int] = []
    memory = type(fsspec.filesystem("memory"))
    fetch = memory.cat_ranges
    monkeypatch.setattr(
        memory, "cat_ranges", lambda self, *a, **k: calls.append(len(a[0])) or fetch(self, *a, **k)
    )
    yield calls
    fsspec.filesystem("memory").store.clear()


def test_a_batch_of_remote_rows_takes_two_calls_and_one_of_examples_one(requests):
    write_dataset("memory://calls", "pretrain", SHARDS)
    data = TokenDataset("memory://calls")
    data.rows(np.array([4, 0, 2]))
    assert requests == [
        3,
        3,
    ]  # the offsets in three shards; in each, segments and tokens, which lie side by side
    requests.clear()
    write_dataset("memory://examples", "sft", EXAMPLES)
    TokenDataset("memory://examples").rows(np.array([4, 0, 2]), pad_to=5)
    assert requests == [3]


@pytest.mark.parametrize(
    ("listed", "asked"), [((0, 1, 2), []), ((0, 2), [1]), ((), [3])], ids=["all", "some", "none"]
)
def test_listed_lengths_are_known_without_a_shard(requests, listed, asked):
    """Lists of earlier versions are without: a folder may have grown since."""
    write_dataset("memory://lengths", "sft", EXAMPLES, list_lengths=listed)
    data = TokenDataset("memory://lengths")
    order = np.array([4, 0, 2, 3, 1])
    assert data.lengths(order).tolist() == [5, 4, 1, 8, 2]
    assert requests == asked
    assert data.rows(order).lengths.tolist() == [5, 4, 1, 8, 2]


def test_lengths_follow_the_passes_over_sources(tmp_path):
    """A mixture sorts its shards by source: the lengths go with them."""
    lengths = [3, 5, 2, 7]
    entries = [
        write_shard(
            str(tmp_path),
            "train",
            str(i),
            one_per_row([([4] * length, 0)], 8, 1),
            "ba"[i % 2],
            list_lengths=i != 2,
        )
        for i, length in enumerate(lengths)
    ]
    write_index(str(tmp_path / "train.parquet"), entries)
    splits = {"train": {"indexes": ["train.parquet"]}}
    dataset = {"kind": "sft", "row_length": 8, "epochs": {"a": 2.0, "b": 0.5}, "splits": splits}
    (tmp_path / "manifest.json").write_text(json.dumps({"dataset": dataset}))
    data = TokenDataset(str(tmp_path))
    indices = np.arange(5)
    for epoch in (0, 1):
        assert data.lengths(indices, epoch).tolist() == [5, 7, 5, 7, lengths[2 * epoch]]
        assert data.rows(indices, epochs=epoch).lengths.tolist() == data.lengths(indices, epoch).tolist()


@pytest.mark.integration
def test_of_an_s3_store_only_what_a_row_needs_is_read(s3_url, s3_gateway):
    """16 KB rows of 20 documents each, 8 MB shards with 128 KB of offsets and segments."""
    url, L, documents = f"{s3_url}/reads", 4096, 20
    rows = [[document(1000 * r + 40 * d, L // documents) for d in range(documents)] for r in range(1024)]
    flat = [
        piece for row in rows for piece in [*row[:-1], np.append(row[-1], np.full(L % documents, 7, "u4"))]
    ]
    half = len(flat) // 2
    write_dataset(
        url, "pretrain", [concatenate_and_cut(part, L, 0) for part in (flat[:half], flat[half:])], L
    )
    data = TokenDataset(url)
    before = s3_gateway.requests, s3_gateway.answered_bytes
    wanted = np.arange(16) * 64 + 3
    read = data.rows(wanted)
    requests = s3_gateway.requests - before[0]
    size = s3_gateway.answered_bytes - before[1]
    for tokens, row in zip(read.tokens, wanted, strict=True):
        assert tokens.tolist() == np.concatenate(flat[documents * row : documents * (row + 1)]).tolist()
    # Of each shard the offsets, whose whole array is shorter than a request is worth, and the segments, 15 KB from row to
    # row; of each row its tokens. An answer has about 300 bytes of headers.
    assert requests == 2 + 2 + 16
    row_bytes = 4 * L + 12 * documents + 16
    assert size < len(wanted) * row_bytes + 2 * (8 * 512 + 12 * documents * 512) + 500 * requests


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


def test_a_token_that_is_none_is_damage(url):
    """A flipped bit makes an id that no embedding has."""
    write_dataset(url, "pretrain", SHARDS, vocab_size=70_003)
    assert TokenDataset(url).rows(np.arange(3)).tokens.max() == 70_002
    with pytest.raises(ShardError, match=r"train/2\.safetensors is damaged"):
        TokenDataset(url).rows(np.arange(4))


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_a_damaged_shard_in_a_store_is_named(s3_url, kind):
    url = f"{s3_url}/damaged-{kind}"
    write_dataset(url, kind, SHARDS if kind == "pretrain" else EXAMPLES)
    good = read_bytes(f"{url}/train/1.safetensors")
    everything = np.arange(5)
    for damaged, problem in (
        (good[:-8], "is shorter than its manifest says"),  # inside of what is asked for
        (good[:30], "is shorter than its manifest says"),  # before it: S3 then refuses the range
        (b"\0" * len(good), "is damaged"),
        (b"\xff" * len(good), "is damaged"),
    ):
        write_bytes(f"{url}/train/1.safetensors", damaged)
        with pytest.raises(ShardError, match=rf"train/1\.safetensors {problem}.*; delete it and run prepare"):
            TokenDataset(url).rows(everything)
    filesystem(url)[0].rm(f"{url}/train/1.safetensors")
    with pytest.raises(ShardError, match=r"missing shard: no file at .*train/1\.safetensors; delete it"):
        TokenDataset(url).rows(everything)


@pytest.mark.integration
def test_rows_are_waited_for_while_their_store_is_away(s3_url, s3_gateway, monkeypatch, caplog):
    """Longer than other reads are tried again."""
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("llada.files._PAUSES_S", (0.1,))
    s3fs.S3FileSystem.clear_instance_cache()
    url = f"{s3_url}/away-rows"
    write_dataset(url, "pretrain", SHARDS)
    data = TokenDataset(url)
    before = data.rows(np.arange(5))
    s3_gateway.close()
    with ThreadPoolExecutor(1) as pool:
        rows = pool.submit(data.rows, np.arange(5))
        try:
            with pytest.raises(StoreError, match="nothing answers"):
                read_bytes(f"{url}/manifest.json")
            while "waiting since" not in caplog.text:
                assert not rows.done()
                time.sleep(0.05)
        finally:
            s3_gateway.open()
        assert np.array_equal(rows.result(60).tokens, before.tokens)
    s3fs.S3FileSystem.clear_instance_cache()
    assert "nothing answers" in caplog.text


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
