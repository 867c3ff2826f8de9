"""What callers give: ids of any kind, padding on either side, seeds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from llada.errors import UserError
from llada.sampling.inputs import as_ids, as_rows, check_padding, left_pad, move_right, row_seeds, seed_keys


def test_left_pad_keeps_rows_at_the_right() -> None:
    ids, attended = left_pad([[1, 2, 3], [], [4]], pad_id=8)
    assert ids.tolist() == [[1, 2, 3], [8, 8, 8], [8, 8, 4]]
    assert attended.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert left_pad([[], []], pad_id=0)[0].shape == (2, 0)


def test_one_id_or_several_or_none() -> None:
    assert as_ids(None) == []
    assert as_ids(np.int64(7)) == [7]
    assert as_ids([3, np.int32(4)]) == [3, 4]


def test_one_row_or_several() -> None:
    assert as_rows(torch.tensor([1, 2], dtype=torch.int32)).tolist() == [[1, 2]]
    assert as_rows(torch.tensor([[1], [2]])).dtype == torch.int64


def test_padding_goes_before_the_tokens() -> None:
    rows = torch.tensor([[5, 6, 7], [5, 6, 0], [0, 6, 0], [0, 0, 0]])
    moved, attended = move_right(rows, check_padding((rows != 0).long(), rows))
    assert moved.tolist() == [[5, 6, 7], [0, 5, 6], [0, 0, 6], [0, 0, 0]]
    assert torch.equal(attended, (moved != 0).long())
    assert check_padding(torch.tensor([0.0, 1.0]), torch.tensor([[0, 4]])).tolist() == [[False, True]]


def test_a_seed_is_for_the_first_row_and_its_successors_for_the_others() -> None:
    assert row_seeds(np.int64(7), 3) == [7, 8, 9]
    assert row_seeds((5, 2), 2) == [5, 2]
    assert seed_keys(5, 3) == seed_keys([5, 6, 7], 3)
    assert len(set(seed_keys(None, 4))) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: as_rows(torch.zeros(1, 2)), "token ids are integers"),
        (lambda: as_rows(torch.zeros(1, 1, 1, dtype=torch.int64)), r"shape \(1, 1, 1\)"),
        (lambda: left_pad([[1], [2.5]], 0), "prompts are lists of token ids"),
        (lambda: check_padding(torch.tensor([[1, 0, 1]]), torch.zeros(1, 3)), "row 0 has padding between"),
        (lambda: row_seeds("x", 1), "a seed is an integer"),
        (lambda: seed_keys([1], 2), "1 seeds for 2 rows"),
    ],
)
def test_what_is_none_of_these_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
