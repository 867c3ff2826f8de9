"""What a prepared folder says of itself, in the form in which finished folders say it."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from llada.data.tokens.manifest import (
    INDEX_SCHEMA,
    LENGTHS,
    DatasetEntry,
    ShardEntry,
    ShardError,
    SplitEntry,
    load_dataset_entry,
    read_index,
    resolve_snapshot,
    write_index,
)
from llada.tokenizer import train_tokenizer

SHARD = ShardEntry("train", "train/a-000.safetensors", 2, 3, 15, 400, "abc", "web")


def write_manifest(folder, **manifest):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_entry_is_spelled_as_ever():
    """The order of the keys too: manifests of finished folders are compared byte for byte."""
    tokenizer = train_tokenizer(["some text"], 270)
    entry = DatasetEntry.of(
        tokenizer,
        kind="pretrain",
        row_length=8,
        packing="best_fit",
        tokenizer_hash="0123",
        root="../..",
        splits={"train": SplitEntry(documents=3, rows=2, tokens=15, indexes=("train.parquet",))},
        sources={"web": {"documents": 3, "rows": 2, "tokens": 15}},
    )
    written = json.dumps(entry.to_json())
    assert written == (
        '{"kind": "pretrain", "row_length": 8, "packing": "best_fit", '
        f'"vocab_size": {len(tokenizer)}, "mask_token_id": 1, '
        '"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 2, "eot_token_id": '
        f'{tokenizer.convert_tokens_to_ids("<|eot_id|>")}, "tokenizer_hash": "0123", "root": "../..", "splits": '
        '{"train": {"documents": 3, "rows": 2, "tokens": 15, "indexes": ["train.parquet"]}}, "sources": '
        '{"web": {"documents": 3, "rows": 2, "tokens": 15}}, "epochs": {}}'
    )
    assert DatasetEntry.from_json(json.loads(written)) == entry


def test_what_was_not_counted_is_left_out_and_read_back():
    entry = DatasetEntry(kind="sft", row_length=8, splits={"train": SplitEntry(indexes=())})
    written = entry.to_json()
    assert "sources" not in written
    assert "documents" not in written["splits"]["train"]
    assert DatasetEntry.from_json(written) == entry
    assert DatasetEntry.from_json({**written, "of_a_later_version": 1}) == entry


def test_lists_of_shards_are_read_back(tmp_path):
    info = write_index(str(tmp_path / "train.parquet"), iter([SHARD]))
    assert info["bytes"] == (tmp_path / "train.parquet").stat().st_size
    dataset = {"kind": "pretrain", "row_length": 8, "splits": {"train": {"indexes": ["train.parquet"]}}}
    write_manifest(tmp_path, dataset=dataset)
    (row,) = read_index(str(tmp_path), "train").to_pylist()
    assert ShardEntry("train", **row) == SHARD
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ShardError, match="list of shards .* is damaged"):
        read_index(str(tmp_path), "train")
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(ShardError, match="missing list of shards"):
        read_index(str(tmp_path), "train")


def test_lengths_are_a_last_column_where_they_are_listed(tmp_path):
    """Beside a list of an earlier version, which has none."""
    listed = replace(SHARD, name="train/b-000.safetensors", lengths=[7, 8])
    write_index(str(tmp_path / "old.parquet"), [SHARD])
    write_index(str(tmp_path / "new.parquet"), [listed, SHARD])
    assert pq.read_schema(tmp_path / "old.parquet").equals(INDEX_SCHEMA)
    assert pq.read_schema(tmp_path / "new.parquet").equals(INDEX_SCHEMA.append(LENGTHS))
    splits = {"train": {"indexes": ["old.parquet", "new.parquet"]}}
    write_manifest(tmp_path, dataset={"kind": "sft", "row_length": 8, "splits": splits})
    rows = read_index(str(tmp_path), "train").to_pylist()
    assert [ShardEntry("train", **row) for row in rows] == [SHARD, listed, SHARD]


def test_the_newest_snapshot(tmp_path):
    write_manifest(tmp_path / "out", snapshot="snapshots/0001")
    write_manifest(tmp_path / "out/snapshots/0001", stage="pretrain")
    newest = resolve_snapshot(str(tmp_path / "out"))
    assert newest == str(tmp_path / "out/snapshots/0001") == resolve_snapshot(newest)
    with pytest.raises(ShardError, match="holds the output of stage 'pretrain', not token shards"):
        load_dataset_entry(newest)
    with pytest.raises(ShardError, match=r"no manifest\.json in .*not complete"):
        resolve_snapshot(str(tmp_path))


def test_the_order_of_a_shards_fields_is_that_of_stored_reports():
    fields = ["split", "name", "rows", "segments", "tokens", "bytes", "sha256", "source"]
    assert list(SHARD.to_json()) == fields
    assert list(replace(SHARD, lengths=[7, 8]).to_json()) == [*fields, "lengths"]
