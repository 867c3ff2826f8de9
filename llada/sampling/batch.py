"""Replies on one canvas, walked together: who joins, whose turn it is, who leaves.

A forward is fed `max_tokens` at the most, of rows whatever their lengths, settings and progress. Where not all fit, turns go
round between groups, not between the rows that one of them has: who has 32 gets no more of the network than who has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llada.model.predict import Model, check_weights, takes_packed_rows
from llada.sampling.cache import row_bytes
from llada.sampling.canvas import Canvas, Step
from llada.sampling.config import SamplingConfig
from llada.sampling.forward import check_invariance, columns_to_feed
from llada.sampling.prefixes import PrefixStore
from llada.sampling.reply import Reply
from llada.sampling.sampler import advance, plan


class Group:
    """Rows that share a turn."""

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority
        """The higher go first where not all rows fit; equals take turns."""
        self.served = 0
        """Tokens fed to the network for it, and for those that had been served least when it came."""
        self.on_canvas = 0
        """Its rows."""


class Run:
    """One reply on its way."""

    def __init__(self, reply: Reply, group: Group) -> None:
        self.reply, self.group = reply, group
        self.served = 0
        """Tokens fed to the network so far."""


class Progress(NamedTuple):
    """What a turn did for a reply."""

    run: Run
    tokens: Tensor  # (L,) int64: its row, masks included
    final_until: int  # the column before which no token changes any more
    forwards: int  # of the row so far


class Batch:
    """The canvas and whose its rows are."""

    def __init__(self, model: Model, *, max_tokens: int, batch_invariant: bool = False) -> None:
        """With `batch_invariant` rounding does not depend on the company either (`forward`)."""
        check_invariance(model, batch_invariant)
        self.model, self.max_tokens, self.batch_invariant = model, max_tokens, batch_invariant
        self.runs: list[Run] = []
        self._canvas: Canvas | None = None
        self._prefixes = PrefixStore()
        self._damage: FloatingPointError | None = None
        try:
            check_weights(model)
        except FloatingPointError as error:  # every reply's failure, and not that of laying them out
            self._damage = error

    def add(self, runs: list[Run], canvases: list[Canvas]) -> None:
        """Put replies on the canvas, each laid out as one row."""
        if not runs:
            return
        for run in runs:
            run.group.on_canvas += 1
        self.runs += runs
        self._canvas = Canvas.join([*([self._canvas] if self._canvas is not None else []), *canvases])

    def keep(self, wanted: Callable[[Run], bool]) -> None:
        """Take all other replies off the canvas."""
        rows = [row for row, run in enumerate(self.runs) if wanted(run)]
        if len(rows) == len(self.runs):
            return
        for run in self.runs:
            run.group.on_canvas -= 1
        self.runs = [self.runs[row] for row in rows]
        for run in self.runs:
            run.group.on_canvas += 1
        assert self._canvas is not None
        self._canvas = self._canvas.take(rows) if rows else None

    def turn(self, fail: Callable[[Run, Exception], None]) -> Iterator[Progress]:
        """One forward, of the rows whose turn it is, and what it did for each. A reply that has ended must be taken off
        before the next; `fail` is told of those whose forward fails alone."""
        canvas = self._canvas
        if canvas is None:
            return
        step = plan(canvas)
        # A row may be given whole, when all its positions are fixed.
        complete = set(range(len(self.runs))) - set(step.rows.tolist() if step else [])
        brought_on = self._advance(canvas, self._whose_turn(canvas, step), fail) if step else []
        final, forwards = canvas.final_until(), canvas.forwards.tolist()
        for row in [*complete, *brought_on]:
            yield Progress(self.runs[row], canvas.tokens[row], final[row], forwards[row])

    def _whose_turn(self, canvas: Canvas, step: Step) -> Step:
        """Those rows of a step that may be fed at once: the higher priority first, then one row of each group, that which
        was served least first, then another of each. At least one."""
        fed = [f.columns.end - f.columns.begin for f in columns_to_feed(canvas, step)]
        if sum(fed) > self.max_tokens:
            seen: Counter[Group] = Counter()
            places: dict[int, tuple[int, int, int]] = {}
            for row in sorted(range(len(fed)), key=lambda row: self.runs[row].served):
                group = self.runs[row].group
                places[row] = (-group.priority, seen[group], group.served)
                seen[group] += 1
            room = self.max_tokens
            chosen: list[int] = []
            for row in sorted(places, key=lambda row: places[row]):
                if chosen and fed[row] > room:
                    break
                chosen.append(row)
                room -= fed[row]
            rows = torch.tensor(sorted(chosen))
            step = Step(step.rows[rows], step.where[rows])
        for row in step.rows.tolist():
            self.runs[row].served += fed[row]
            self.runs[row].group.served += fed[row]
        return step

    def _advance(self, canvas: Canvas, step: Step, fail: Callable[[Run, Exception], None]) -> list[int]:
        """The rows that the forward brought on. Where it fails, each row is tried alone."""
        try:
            if self._damage is not None:
                raise self._damage
            advance(self.model, canvas, step, self._prefixes, batch_invariant=self.batch_invariant)
            return step.rows.tolist()
        except Exception as error:
            if len(step.rows) == 1:
                fail(self.runs[int(step.rows[0])], error)
                return []
        alone = (Step(step.rows[i : i + 1], step.where[i : i + 1]) for i in range(len(step.rows)))
        return [row for one in alone for row in self._advance(canvas, one, fail)]


def cache_bytes(model: Model, config: SamplingConfig, length: int) -> int:
    """What the keys and values of a row of this length take."""
    if not takes_packed_rows(model):
        return 0
    return row_bytes(config, model.config, length, model.embed.weight.itemsize)
