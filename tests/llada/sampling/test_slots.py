"""One pattern for all positions of a slot, by the network's own weights; never two of them mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llada.errors import UserError
from llada.model.transformer import Transformer
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.sampler import denoise
from llada.sampling.slots import Slot, Slots

MASK, V = 22, 23


def sets(*ids: list[int]) -> torch.Tensor:
    table = torch.zeros(len(ids), V, dtype=torch.bool)
    for number, own in enumerate(ids):
        table[number, own] = True
    return table


# At positions 1 to 3: 3 4 5, or 6 and any two of 7 and 8; at position 5: 9 or 10.
SLOTS = Slots(sets([3], [4], [5], [6], [7, 8], [9, 10]), [Slot(1, ((0, 1, 2), (3, 4, 4))), Slot(5, ((5,),))])


def fits(text: list[int]) -> bool:
    first = text[1:4] == [3, 4, 5] or (text[1] == 6 and {*text[2:4]} <= {7, 8})
    return first and text[5] in (9, 10)


def test_what_is_written_fits(make_model: Callable[..., Transformer], any_rule: dict[str, Any]) -> None:
    """In blocks that cut a slot, with each rule, beside rows without slots; all patterns come up."""
    config = SamplingConfig(8, 4, 2, **{"temperature": 2.0, **any_rule})
    found = set()
    model = make_model()
    for seed in range(12):
        rows = [
            prompt_canvas([[3] * (2 + seed % 3)], config, mask_id=MASK, seed=[seed], slots=slots)
            for slots in (None, SLOTS)
        ]
        canvas = Canvas.join(rows)
        for _ in denoise(model, canvas):
            pass
        start = 2 + seed % 3
        text = canvas.tokens[1, start : start + 8].tolist()
        assert fits(text)
        found.add(text[1])
    assert found == {3, 6}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_pattern_is_drawn_by_its_weight(temperature: float) -> None:
    """Σ over the open positions of log Σ p over the set, at the temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, V, generator=generator, dtype=torch.float64)
    p = logits.softmax(1)
    weights = torch.tensor([p[0, 3] * p[1, 4] * p[2, 5], p[0, 6] * p[1, [7, 8]].sum() * p[2, [7, 8]].sum()])
    count = 0
    for draw in range(400):
        own = logits.clone()
        SLOTS.rule_out(
            own,
            torch.arange(3),
            torch.tensor([1, 2, 3]),
            torch.full((8,), MASK),
            mask_id=MASK,
            temperature=temperature,
            uniforms=[(draw + 0.5) / 400, 0.0],
        )
        kept = [row.nonzero().flatten().tolist() for row in own > -torch.inf]
        assert kept in ([[3], [4], [5]], [[6], [7, 8], [7, 8]])
        count += kept[0] == [6]
    if temperature == 0:
        assert count == 400 * (weights[1] > weights[0])
    else:
        expected = (weights.log() / temperature).softmax(0)[1]
        assert count / 400 == pytest.approx(float(expected), abs=0.005)


def test_what_is_written_decides_for_the_rest() -> None:
    for held, left in (({1: 3}, [[4], [5]]), ({3: 7}, [[6], [7, 8]])):
        text = torch.full((8,), MASK)
        for place, token in held.items():
            text[place] = token
        places = [place for place in (1, 2, 3) if place not in held]
        logits = torch.zeros(2, V)
        SLOTS.rule_out(
            logits,
            torch.arange(2),
            torch.tensor(places),
            text,
            mask_id=MASK,
            temperature=0.0,
            uniforms=[0.0, 0.0],
        )
        assert [row.nonzero().flatten().tolist() for row in logits > -torch.inf] == left


def test_patterns_are_of_one_length() -> None:
    for patterns in (((0,), (0, 1)), ((),), ()):
        with pytest.raises(UserError, match="patterns of one length"):
            Slot(0, patterns)
