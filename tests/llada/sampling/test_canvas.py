"""The canvas: where its text starts, which blocks hold masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llada.errors import UserError
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.sampler import plan

MASK, EOS = 9, 1


def test_blocks_are_counted_from_where_the_text_starts() -> None:
    config = SamplingConfig(gen_length=5, steps=7, block_length=2)
    canvas = prompt_canvas([[1, MASK, 2], [3]], config, mask_id=MASK, suffix=[4, 5, 6])
    assert canvas.start.tolist() == [3, 3]
    assert canvas.tokens.tolist() == [
        [1, MASK, 2] + [MASK] * 5 + [4, 5, 6],
        [0, 0, 3] + [MASK] * 5 + [4, 5, 6],
    ]
    # A hole in the prompt belongs to the first block.
    assert canvas.block_of.tolist() == [[0] * 5 + [1] * 2 + [2] * 2 + [3] * 2] * 2
    assert canvas.steps_of.tolist() == [[3, 2, 2, 0]] * 2  # the suffix's block takes none
    assert canvas.attended.long().tolist() == [[1] * 11, [0, 0] + [1] * 9]
    assert canvas.prompt.tolist()[0] == [True, False, True] + [False] * 5 + [True] * 3


def test_the_input_is_not_changed() -> None:
    tokens = torch.tensor([[1, MASK]])
    canvas = Canvas(tokens, SamplingConfig(), mask_id=MASK, start=0)
    canvas.tokens.fill_(7)
    assert tokens.tolist() == [[1, MASK]]


def test_what_cannot_be_laid_out_is_refused() -> None:
    padded, attended = torch.tensor([[MASK, 1]]), torch.tensor([[0, 1]])
    for build, message in (
        (lambda: prompt_canvas(padded, SamplingConfig(), mask_id=MASK, attention_mask=attended), "padding"),
        (
            lambda: prompt_canvas([[1]], SamplingConfig(), mask_id=MASK, attention_mask=attended),
            "lists are padded",
        ),
        (lambda: prompt_canvas([[1], [2]], SamplingConfig(), mask_id=MASK, seed=[1]), "1 seeds for 2 rows"),
        (
            lambda: prompt_canvas([[1]], SamplingConfig(), mask_id=MASK, eos_id=[1, MASK]),
            "both the mask token and",
        ),
        (
            lambda: prompt_canvas([[1]], SamplingConfig(fixed={2: 1, 5: 3}), mask_id=MASK, eos_id=1),
            "fixed puts tokens behind the end",
        ),
    ):
        with pytest.raises(UserError, match=message):
            build()


def test_noise_belongs_to_the_seed_not_to_the_row() -> None:
    def keys(rows: int, seed: object) -> list[int]:
        return Canvas(
            torch.zeros(rows, 1).long(), SamplingConfig(), mask_id=MASK, start=0, seed=seed
        ).seed_keys.tolist()

    assert keys(3, 5) == keys(3, [5, 6, 7])
    assert keys(1, 6) == keys(3, 5)[1:2]
    assert len(set(keys(2, [1, 1 + 2**32]))) == 2  # all bits of a seed count
    assert keys(2, None) != keys(2, None)


def test_a_block_longer_than_the_row_is_the_row() -> None:
    canvas = prompt_canvas([[1]], SamplingConfig(gen_length=3, steps=2, block_length=2**80), mask_id=MASK)
    assert canvas.block_of.tolist() == [[0] * 4]
    assert canvas.steps_of.tolist() == [[2]]


def test_seeds_are_integers_of_any_kind_and_size() -> None:
    def keys(seed: int | list[int]) -> list[int]:
        rows = prompt_canvas([[1], [2]], SamplingConfig(gen_length=1), mask_id=MASK, seed=seed)
        return rows.seed_keys.tolist()

    assert keys(np.int64(7)) == keys(7) == keys([7, 8]) == keys([np.int64(7), np.int32(8)])
    assert len({*keys(2**63 - 1), *keys(2**63 + 1)}) == 4


@pytest.mark.parametrize(
    "knobs", [{}, {"remasking": "ancestral"}, {"remdm_cap": 0.5}, {"p2_eta": 1.0}], ids=str
)
@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_an_empty_canvas_is_finished(knobs: dict[str, Any], shape: tuple[int, int]) -> None:
    tokens = torch.empty(shape, dtype=torch.int64)
    assert plan(Canvas(tokens, SamplingConfig(**knobs), mask_id=MASK, start=0, eos_id=EOS)) is None
