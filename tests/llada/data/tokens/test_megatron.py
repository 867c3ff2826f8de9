import itertools
import json
import struct

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.data.tokens.manifest import write_index
from llada.data.tokens.megatron import export_megatron, import_megatron, import_megatron_shards
from llada.data.tokens.packing import best_fit, concatenate_and_cut, one_per_row, take_tokens
from llada.data.tokens.shards import TokenDataset, write_shard
from llada.files import join, write_bytes

EOS = 0
ROW = 8


def write_dataset(url, shards, *, vocab_size, kind="pretrain", packing="concatenate_and_cut"):
    entries = [write_shard(url, "train", str(i), rows) for i, rows in enumerate(shards)]
    dataset = {
        "kind": kind,
        "row_length": ROW,
        "vocab_size": vocab_size,
        "eos_token_id": EOS,
        "packing": packing,
        "splits": {"train": {"indexes": ["train.parquet"]}},
    }
    write_index(join(url, "train.parquet"), entries)
    write_bytes(join(url, "manifest.json"), json.dumps({"dataset": dataset}).encode())


def open_shards(url, shards):
    dataset = {"kind": "pretrain", "row_length": ROW, "splits": {"train": {"indexes": ["train.parquet"]}}}
    write_index(join(url, "train.parquet"), shards)
    write_bytes(join(url, "manifest.json"), json.dumps({"dataset": dataset}).encode())
    return TokenDataset(url)


def parse(folder, prefix):
    """The format, read by hand: dtype and the documents, each a list of sequences."""
    idx, data = (folder / f"{prefix}.idx").read_bytes(), (folder / f"{prefix}.bin").read_bytes()
    assert idx[:9] == b"MMIDIDX\0\0"
    version, code, sequences, borders = struct.unpack("<QBQQ", idx[9:34])
    assert version == 1
    letter, size = {4: ("i", 4), 8: ("H", 2)}[code]
    lengths = struct.unpack_from(f"<{sequences}i", idx, 34)
    pointers = struct.unpack_from(f"<{sequences}q", idx, 34 + 4 * sequences)
    documents = struct.unpack_from(f"<{borders}q", idx, 34 + 12 * sequences)
    assert len(idx) == 34 + 12 * sequences + 8 * borders
    assert len(data) == size * sum(lengths)
    found = [
        list(struct.unpack_from(f"<{n}{letter}", data, p)) for n, p in zip(lengths, pointers, strict=True)
    ]
    return code, [found[a:b] for a, b in itertools.pairwise(documents)]


def document(start, length):
    return np.array([*range(start, start + length - 1), EOS], dtype=np.uint32)


DOCUMENTS = [document(100, 5), document(200, 30), document(300, 1), document(400, 16), document(500, 9)]


def concatenated_shards(documents, rows_first):
    head, rest = take_tokens(documents, rows_first * ROW)
    return [concatenate_and_cut(part, ROW, EOS) for part in (head, rest)]


@pytest.mark.parametrize("vocab_size, code", [(65_535, 8), (65_536, 4)])
def test_bytes_are_what_the_format_says(tmp_path, vocab_size, code):
    write_dataset(str(tmp_path / "data"), concatenated_shards(DOCUMENTS, 3), vocab_size=vocab_size)
    result = export_megatron(str(tmp_path / "data"), "train", str(tmp_path / "out" / "corpus"))
    found_code, documents = parse(tmp_path / "out", "corpus")
    assert found_code == code
    assert documents == [[d.tolist()] for d in DOCUMENTS]  # whole again, across rows and shards
    assert result == {"documents": 5, "tokens": 61, "bytes": 61 * (2 if code == 8 else 4)}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 200_000), max_size=40), min_size=1, max_size=8), st.integers(1, 5))
def test_there_and_back(lists, rows_per_shard):
    documents = [np.array([*tokens, EOS], dtype=np.uint32) for tokens in lists]
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    url, prefix = "memory://megatron/data", "memory://megatron/out/corpus"
    write_dataset(url, concatenated_shards(documents, rows_per_shard), vocab_size=200_001)
    export_megatron(url, "train", prefix)
    assert [d.tolist() for d in import_megatron(prefix)] == [d.tolist() for d in documents]
    shards, counts = import_megatron_shards(
        prefix, "memory://megatron/back", split="train", row_length=ROW, vocab_size=200_001, eos_id=EOS,
        rows_per_shard=rows_per_shard,
    )  # fmt: skip
    assert [shard.rows for shard in shards[:-1]] == [rows_per_shard] * (len(shards) - 1)
    names = {"row_length": ROW, "kind": "pretrain", "splits": {"train": {"indexes": ["train.parquet"]}}}
    write_index("memory://megatron/back/train.parquet", shards)
    write_bytes("memory://megatron/back/manifest.json", json.dumps({"dataset": names}).encode())
    back, before = (TokenDataset(folder, "train") for folder in ("memory://megatron/back", url))
    assert len(back) == len(before)
    a, b = back.rows(np.arange(len(back))), before.rows(np.arange(len(before)))
    assert np.array_equal(a.tokens, b.tokens)
    assert np.array_equal(a.segment_ids, b.segment_ids)
    assert np.array_equal(counts, np.bincount(np.concatenate(documents), minlength=200_001))
    memory.store.clear()


def test_best_fit_rows_give_a_document_per_segment(tmp_path):
    documents = [document(100, 12), document(200, 8), document(300, 3)]
    rows = best_fit(documents, ROW, EOS)
    write_dataset(str(tmp_path / "data"), [rows], vocab_size=1000, packing="best_fit")
    export_megatron(str(tmp_path / "data"), "train", str(tmp_path / "corpus"))
    first, rest = documents[0][:ROW], documents[0][ROW:]
    expected = [[d.tolist()] for d in (first, documents[1], rest, documents[2])]
    assert parse(tmp_path, "corpus")[1] == expected


def test_documents_of_several_sequences_are_joined_closed_and_packed(tmp_path):
    tokens = np.array([7, 8, 9, 5, 6, 1, 2, 3, EOS], dtype="<i4")
    (tmp_path / "m.bin").write_bytes(tokens.tobytes())
    # sequences [7 8] [9] [5 6] [1 2 3 EOS]; documents: the first two, none, the third, the fourth
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 4, 5)
    index += struct.pack("<4i4q5q", 2, 1, 2, 4, 0, 8, 12, 20, 0, 2, 2, 3, 4)
    (tmp_path / "m.idx").write_bytes(index)
    prefix = str(tmp_path / "m")
    documents = list(import_megatron(prefix))
    assert [d.tolist() for d in documents] == [[7, 8, 9], [], [5, 6], [1, 2, 3, EOS]]
    assert all(d.dtype == np.uint32 for d in documents)
    shards, counts = import_megatron_shards(
        prefix,
        str(tmp_path / "out"),
        split="train",
        row_length=ROW,
        vocab_size=10,
        eos_id=EOS,
        packing="best_fit",
    )
    dataset = {"kind": "pretrain", "row_length": ROW, "splits": {"train": {"indexes": ["train.parquet"]}}}
    write_index(str(tmp_path / "out" / "train.parquet"), shards)
    write_bytes(str(tmp_path / "out" / "manifest.json"), json.dumps({"dataset": dataset}).encode())
    rows = TokenDataset(str(tmp_path / "out")).rows(np.array([0, 1]))
    assert rows.tokens.tolist() == [[7, 8, 9, EOS, 1, 2, 3, EOS], [5, 6, EOS, EOS, EOS, EOS, EOS, EOS]]
    assert rows.lengths.tolist() == [8, 3]
    assert counts.tolist() == [3, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"document 0 holds token 9, the tokenizer has 9"):
        import_megatron_shards(
            prefix, str(tmp_path / "no"), split="train", row_length=ROW, vocab_size=9, eos_id=EOS
        )


def test_damage_is_named(tmp_path):
    write_dataset(str(tmp_path / "data"), concatenated_shards(DOCUMENTS, 3), vocab_size=1000)
    prefix = str(tmp_path / "c")
    export_megatron(str(tmp_path / "data"), "train", prefix)
    good_idx, good_bin = (tmp_path / "c.idx").read_bytes(), (tmp_path / "c.bin").read_bytes()
    documents_at = 34 + 12 * len(DOCUMENTS)
    for idx, data, message in (
        (b"MMIDIDX\0\1" + good_idx[9:], good_bin, r"c\.idx is no Megatron index"),
        (b"", good_bin, r"c\.idx is no Megatron index"),
        (good_idx[:20], good_bin, r"c\.idx ends in its header"),
        (good_idx[:-1], good_bin, r"c\.idx has 141 bytes instead of 142"),
        (good_idx[:9] + b"\2" + good_idx[10:], good_bin, "version 2 and dtype code 8"),
        (
            good_idx[:17] + b"\7" + good_idx[18:],
            good_bin,
            r"dtype code 7; readable: .*4 \(int32\), 8 \(uint16\)",
        ),
        (good_idx[:documents_at] + b"\1" + good_idx[documents_at + 1 :], good_bin, r"c\.idx is damaged"),
        (good_idx, good_bin[:-1], r"c\.bin has 121 bytes, its index needs 122"),
    ):
        (tmp_path / "c.idx").write_bytes(idx)
        (tmp_path / "c.bin").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            next(import_megatron(prefix))
    with pytest.raises(ValueError, match=r"no .*other\.idx and \.bin"):
        next(import_megatron(str(tmp_path / "other")))


def test_negative_tokens_are_refused(tmp_path):
    (tmp_path / "m.bin").write_bytes(np.array([3, -1], dtype="<i4").tobytes())
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 1, 2) + struct.pack("<iqqq", 2, 0, 0, 1)
    (tmp_path / "m.idx").write_bytes(index)
    with pytest.raises(ValueError, match="document 0 holds -1"):
        list(import_megatron(str(tmp_path / "m")))


def test_sft_data_is_refused(tmp_path):
    write_dataset(str(tmp_path), [one_per_row([([1, 2, EOS], 1)], ROW, EOS)], vocab_size=10, kind="sft")
    with pytest.raises(ValueError, match="holds sft data"):
        export_megatron(str(tmp_path), "train", str(tmp_path / "c"))
