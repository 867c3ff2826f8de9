"""What an unmasking rule may look at: the candidates of a step, rows by slots, and what the model thinks of them.

What is costly (anything over the vocabulary) is computed when a rule asks for it, once.

Shape legend: b rows at work, C slots, N candidates in all, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llada.diffusion.noise import row_keys, stream_key, uniforms_of
from llada.sampling.draw import certainty, confidence, two_likeliest

_ORDER = stream_key(0, "order")


@dataclass(frozen=True)
class Candidates:
    """Of the rows at work, the masks of the block that each works on, in the order of their columns; for a rule that weighs
    them, the tokens among them that were generated too. Tables hold −∞ (or what is asked for) in the slots behind a row's
    last candidate."""

    logits: Tensor
    """(N, V) at least float32, on the network's device, what must not be written at −∞; without temperature, which must not
    enter a confidence. Not to be changed."""
    tokens: Tensor
    """(N,): what a position becomes if it is committed, or, if it was before, holds."""
    is_held: Tensor
    """(N,) bool: committed before."""
    row: Tensor
    """(N,): the row, of the b at work, in which a candidate stands."""
    slot: Tensor
    """(N,): its place among the row's candidates."""
    column: Tensor
    """(N,): its column on the canvas."""
    shape: tuple[int, int]
    """(b, C)."""
    step: Tensor
    """(b,): how many forwards the row has had in its block."""
    steps: Tensor
    """(b,): how many it may have there."""
    quota: Tensor
    """(b,): how many to commit so that the block is full after its steps, equally many at each (LLaDA)."""
    knobs: Tensor
    """(b, n) float64: each row's value of the rule's `knob` and of the settings `beside` it; 0 where there is none."""
    draw_keys: Callable[[], Tensor]
    """Makes `noise_keys` where they are wanted: most rules draw nothing."""
    doubt: Tensor
    """(N,): by how many nats rounding may have moved the logit of the token."""
    unsure_ids: Tensor | None
    """(N, n): ids that count as impossible in a confidence; None: no row has any."""

    @property
    def knob(self) -> Tensor:
        """(b, 1) float64: each row's value of the setting that has switched the rule on."""
        return self.knobs[:, :1]

    def table(self, values: Tensor, fill: float = -torch.inf) -> Tensor:
        """values (N,) as a table (b, C)."""
        table = torch.full(self.shape, fill, dtype=values.dtype, device=values.device)
        table[self.row, self.slot] = values
        return table

    def of_rows(self, rows: Tensor) -> Candidates:
        """Those of some rows (b,) bool alone."""
        here = rows[self.row]
        slot = self.slot[here]
        return Candidates(
            logits=self.logits[here.to(self.logits.device)],
            tokens=self.tokens[here],
            is_held=self.is_held[here],
            row=(rows.cumsum(0) - 1)[self.row[here]],
            slot=slot,
            column=self.column[here],
            shape=(int(rows.sum()), int(slot.max()) + 1),
            step=self.step[rows],
            steps=self.steps[rows],
            quota=self.quota[rows],
            knobs=self.knobs[rows],
            draw_keys=lambda: self.noise_keys[here],
            doubt=self.doubt[here],
            unsure_ids=None if self.unsure_ids is None else self.unsure_ids[here],
        )

    @cached_property
    def noise_keys(self) -> Tensor:
        """(N,) of the row's seed, its forward and the position."""
        return self.draw_keys()

    @cached_property
    def exists(self) -> Tensor:
        """(b, C) bool: the slots that hold a candidate."""
        table = torch.zeros(self.shape, dtype=torch.bool)
        table[self.row, self.slot] = True
        return table

    @cached_property
    def confidence(self) -> Tensor:
        """(b, C): the model's probability of the token."""
        return self.table(confidence(self.logits, self.tokens, self.unsure_ids).cpu())

    @cached_property
    def confidence_slack(self) -> Tensor:
        """(b, C): confidences so near to each other are equal but for rounding: p (1 − p) · doubt."""
        confidence = self.confidence.clamp(min=0)
        return confidence * (1 - confidence) * self.table(self.doubt, 0.0)

    @cached_property
    def _two_likeliest(self) -> tuple[Tensor, Tensor]:
        """(b, C) each: their probabilities; 0 where the token is of no confidence."""
        is_sure = self.confidence[self.row, self.slot] > 0
        probs = two_likeliest(self.logits, self.unsure_ids).cpu() * is_sure[:, None]
        return self.table(probs[:, 0]), self.table(probs[:, 1], 0.0)

    @property
    def margin(self) -> Tensor:
        """(b, C): how much likelier the likeliest token is than the next one."""
        first, second = self._two_likeliest
        return first - second

    @property
    def margin_slack(self) -> Tensor:
        """(b, C): as `confidence_slack`."""
        first, second = (p.clamp(min=0) for p in self._two_likeliest)
        return (first * (1 - first) + second * (1 - second)) * self.table(self.doubt, 0.0)

    @cached_property
    def certainty(self) -> Tensor:
        """(b, C): minus the entropy of the model's distribution, in nats."""
        return self.table(certainty(self.logits).cpu())

    @cached_property
    def certainty_slack(self) -> Tensor:
        """(b, C): as `confidence_slack`; Σ p |log p + H| ≤ 2 H bounds what a nat of doubt does to the entropy H."""
        return -2 * self.certainty.clamp(min=-1e30) * self.table(self.doubt, 0.0)

    @cached_property
    def uniform(self) -> Tensor:
        """(b, C): noise in [0, 1), drawn anew at each forward of a row."""
        return self.table(uniforms_of(row_keys(_ORDER, self.noise_keys)))
