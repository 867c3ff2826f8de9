"""Batches: any part of one keeps what its noise depends on."""

import torch

from llada.diffusion.batch import Batch


def batch_of(rows: int) -> Batch:
    return Batch(
        tokens=torch.arange(rows * 3).view(rows, 3),
        segment_ids=None,
        maskable=torch.ones(rows, 3).bool(),
        slots=torch.arange(rows) * 2,
        epochs=torch.zeros(rows).long(),
        sample_ids=torch.arange(rows) + 100,
        step=4,
        global_rows=2 * rows,
        per_row=True,
    )


def test_split_keeps_slots_and_ids() -> None:
    whole = batch_of(5)
    parts = list(whole.split([2, 2, 1]))
    assert [len(part.tokens) for part in parts] == [2, 2, 1]
    for name in ("tokens", "maskable", "slots", "epochs", "sample_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    for part in parts:
        assert (part.step, part.global_rows, part.per_row, part.segment_ids) == (4, 10, True, None)


def test_select_takes_rows_in_any_order() -> None:
    chosen = batch_of(5).select(torch.tensor([3, 0, 3]))
    assert chosen.sample_ids.tolist() == [103, 100, 103]
    assert chosen.tokens[0].tolist() == [9, 10, 11]


def test_map_and_to_leave_what_is_no_tensor() -> None:
    moved = batch_of(2).to(torch.device("meta"))
    assert moved.tokens.is_meta
    assert moved.segment_ids is None
    assert moved.step == 4
