"""Stretches of a text that hold one of several patterns: what keeps a reply within a format while the model fills it in.

A pattern says for each position of its slot which tokens may stand there, and any choice within it is right; which pattern is
taken is decided for all positions together, so that never two of them are mixed. At each forward the patterns that what is
committed has left are weighed by the product over the open positions of the probability that the network gives to what each
allows; one is drawn (the likeliest without temperature), and the others' tokens are ruled out.

Shape legend: N candidates, V vocabulary rows, S sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llada.errors import UserError


@dataclass(frozen=True)
class Slot:
    begin: int
    """Its first position, counted from where the text starts."""
    patterns: tuple[tuple[int, ...], ...]
    """Of each, all of one length, which set of tokens may stand at each position."""

    def __post_init__(self) -> None:
        lengths = {len(pattern) for pattern in self.patterns}
        if len(lengths) != 1 or 0 in lengths:
            raise UserError(f"a slot needs patterns of one length, not of {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.patterns[0])


@dataclass(frozen=True, eq=False)
class Slots:
    """The slots of a text. No two share a position."""

    sets: Tensor
    """(S, V) bool: which tokens are in each set."""
    slots: Sequence[Slot]

    def rule_out(
        self,
        logits: Tensor,
        which: Tensor,
        position: Tensor,
        text: Tensor,
        *,
        mask_id: int,
        temperature: float,
        uniforms: Sequence[float],
    ) -> None:
        """Set to −∞ in `logits` (N, V) what must not stand at the positions (M,) of the candidates `which` (M,).

        Args:
            text: (n,) the ids from position 0 on, masks included.
            uniforms: a number in [0, 1) for each slot, by which its pattern is drawn.
        """
        candidate = dict(zip(position.tolist(), which.tolist(), strict=True))
        sets = self.sets.to(logits.device)
        for slot, uniform in zip(self.slots, uniforms, strict=True):
            own = {i: candidate[slot.begin + i] for i in range(len(slot)) if slot.begin + i in candidate}
            if not own:
                continue
            held = text[slot.begin : slot.begin + len(slot)].tolist()
            left = [
                pattern
                for pattern in slot.patterns
                if all(
                    token == mask_id or bool(self.sets[kind, token])
                    for token, kind in zip(held, pattern, strict=True)
                )
            ]
            chosen = left[0]
            if len(left) > 1:
                rows = logits[list(own.values())].double()
                by_place = dict(zip(own, rows, strict=True))
                scores = torch.stack(
                    [
                        torch.stack([by_place[i][sets[pattern[i]]].logsumexp(0) for i in own]).sum()
                        for pattern in left
                    ]
                ).cpu()
                chosen = left[_draw(scores, temperature, uniform)]
            for i, row in own.items():
                logits[row].masked_fill_(~sets[chosen[i]], -torch.inf)


def _draw(scores: Tensor, temperature: float, uniform: float) -> int:
    """Which of the log-weights is drawn; the first of the highest without temperature."""
    if temperature == 0:
        return int(scores.argmax())
    sums = (scores / temperature).softmax(0).cumsum(0)
    return int(torch.searchsorted(sums, uniform * sums[-1] * (1 - 2.0**-50), right=True))
