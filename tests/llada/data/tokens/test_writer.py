"""Shards by the row: what is written when, for both kinds of items."""

import numpy as np
import pytest

from llada.data.tokens.chat import Example
from llada.data.tokens.packing import RowLayout
from llada.data.tokens.writer import ShardWriter


@pytest.mark.parametrize(("packing", "rows"), [("concatenate_and_cut", [2, 2, 1]), ("best_fit", [3, 3])])
def test_a_shard_is_written_when_its_rows_are_full(tmp_path, packing, rows):
    layout = RowLayout(8, 0, packing)
    writer = ShardWriter(str(tmp_path), "train", "unit-{:03d}", layout, 2, 10, "web")
    for _ in range(6):
        writer.add(np.arange(1, 7, dtype=np.uint32))
    shards = writer.close()
    assert [shard.rows for shard in shards] == rows
    assert [shard.name for shard in shards] == [f"train/unit-{n:03d}.safetensors" for n in range(len(rows))]
    assert {(shard.split, shard.source) for shard in shards} == {("train", "web")}
    assert sum(shard.tokens for shard in shards) == 36
    assert writer.counts.tolist() == [0, 6, 6, 6, 6, 6, 6, 0, 0, 0]
    assert writer.close() == shards  # nothing is written twice


def test_examples_take_a_row_each(tmp_path):
    layout = RowLayout(8, 0, kind="sft")
    writer = ShardWriter(str(tmp_path), "train", "unit-{:03d}", layout, 2, 10)
    for _ in range(3):
        writer.add(Example([5, 6, 7], 1, False))
    assert [(shard.rows, shard.tokens) for shard in writer.close()] == [(2, 6), (1, 3)]
    assert writer.counts.tolist() == [0, 0, 0, 0, 0, 0, 3, 3, 0, 0]  # of the answers alone
