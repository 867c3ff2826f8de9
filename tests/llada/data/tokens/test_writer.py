"""Shards by the row: what is written when, for both kinds of items."""

import numpy as np
import pytest

from llada.data.document import Document
from llada.data.outcomes import Report
from llada.data.tokens.chat import Example
from llada.data.tokens.packing import RowLayout
from llada.data.tokens.writer import ShardWriter, Target, write


@pytest.mark.parametrize("kind", ["pretrain", "unified"])
@pytest.mark.parametrize(("packing", "rows"), [("concatenate_and_cut", [2, 2, 1]), ("best_fit", [3, 3])])
def test_a_shard_is_written_when_its_rows_are_full(tmp_path, packing, rows, kind):
    layout = RowLayout(8, 0, packing, kind)
    writer = ShardWriter("train", Target(str(tmp_path), "unit-{:03d}", layout, 2, 10, source="web"))
    for _ in range(6):
        writer.add(np.arange(1, 7, dtype=np.uint32))
    shards = writer.close()
    assert [shard.rows for shard in shards] == rows
    assert [shard.name for shard in shards] == [f"train/unit-{n:03d}.safetensors" for n in range(len(rows))]
    assert {(shard.split, shard.source) for shard in shards} == {("train", "web")}
    assert sum(shard.tokens for shard in shards) == 36
    assert writer.counts.tolist() == [0, 6, 6, 6, 6, 6, 6, 0, 0, 0]
    assert writer.close() == shards  # nothing is written twice
    assert {shard.lengths for shard in shards} == {None}


def test_examples_take_a_row_each(tmp_path):
    layout = RowLayout(8, 0, kind="sft")
    writer = ShardWriter("train", Target(str(tmp_path), "unit-{:03d}", layout, 2, 10))
    for tokens in ([5, 6, 7], [5, 6, 7, 8], [5, 6]):
        writer.add(Example(tokens, 1, False))
    shards = writer.close()
    assert [(shard.rows, shard.tokens, shard.lengths) for shard in shards] == [(2, 7, [3, 4]), (1, 2, [2])]
    assert writer.counts.tolist() == [0, 0, 0, 0, 0, 0, 3, 2, 1, 0]  # of the answers alone


def test_documents_go_to_their_splits(tmp_path):
    target = Target(str(tmp_path), "unit-{:03d}", RowLayout(8, 0), 100, 50, validation_fraction=0.3)
    encoded = [(Document(f"text {n}"), [np.full(4, n, dtype=np.uint32)]) for n in range(50)]
    report = Report()
    shards, unigrams = write(encoded, target, report)
    assert {shard.split: shard.tokens for shard in shards} == {
        split: 4 * report.splits[split]["documents"] for split in ("train", "validation")
    }
    assert sum(split["documents"] for split in report.splits.values()) == 50
    assert 5 < report.splits["validation"]["documents"] < 30
    assert set(unigrams.tolist()) == {0, 4}  # of the train split
    assert unigrams.sum() == report.splits["train"]["tokens"]


def test_a_split_without_documents_has_no_shard(tmp_path):
    report = Report()
    assert write([], Target(str(tmp_path), "unit-{:03d}", RowLayout(8, 0), 2, 10), report).shards == []
    assert report.splits["validation"] == {"documents": 0, "rows": 0, "tokens": 0}
