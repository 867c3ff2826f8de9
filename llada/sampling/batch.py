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

from llada.errors import UserError
from llada.model.predict import Model, check_weights, takes_packed_rows
from llada.sampling.cache import row_bytes
from llada.sampling.canvas import Canvas, Step
from llada.sampling.config import SamplingConfig
from llada.sampling.forward import check_invariance, columns_to_feed, forward
from llada.sampling.prefixes import PrefixStore
from llada.sampling.reply import Reply
from llada.sampling.sampler import commit, plan


class Group:
    """Rows that share a turn."""

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority
        """The higher go first where not all rows fit; equals take turns."""
        self.served = 0
        """Tokens fed to the network for it, and for those that had been served least when its rows came."""
        self.on_canvas = 0
        """Its rows."""


class Run:
    """One reply on its way."""

    def __init__(self, reply: Reply, group: Group) -> None:
        self.reply, self.group = reply, group
        self.served = 0
        """As `Group.served`, among the rows of its group."""
        self.fed = 0
        """Tokens fed to the network for it."""


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
        self._damage: str | None = None
        try:
            check_weights(model)
        except FloatingPointError as error:  # every reply's failure, and not that of laying them out
            self._damage = str(error)

    def add(self, runs: list[Run], canvases: list[Canvas]) -> None:
        """Put replies on the canvas, each laid out as one row. Who comes late makes up for nothing: he is served as if he
        had had as much as the others had at the least."""
        if not runs:
            return
        for run in runs:
            group = run.group
            if group.on_canvas:
                run.served = min(other.served for other in self.runs if other.group is group)
            else:
                group.served = max(group.served, min((other.group.served for other in self.runs), default=0))
            group.on_canvas += 1
            self.runs.append(run)
        self._canvas = Canvas.join([*([self._canvas] if self._canvas is not None else []), *canvases])

    def keep(self, wanted: Callable[[Run], bool]) -> None:
        """Take all other replies off the canvas."""
        rows = [row for row, run in enumerate(self.runs) if wanted(run)]
        if len(rows) == len(self.runs):
            return
        for row in set(range(len(self.runs))).difference(rows):
            self.runs[row].group.on_canvas -= 1
        self.runs = [self.runs[row] for row in rows]
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
        fed, final, forwards = canvas.token_forwards.tolist(), canvas.final_until(), canvas.forwards.tolist()
        for row in [*complete, *brought_on]:
            run = self.runs[row]
            run.group.served += fed[row] - run.fed
            run.served += fed[row] - run.fed
            run.fed = fed[row]
            yield Progress(run, canvas.tokens[row], final[row], forwards[row])

    def reveal_steps(self, run: Run) -> tuple[int, ...]:
        """Which forward of the row each of its columns was committed in; -1 in none."""
        assert self._canvas is not None
        return tuple(self._canvas.reveal_step[self.runs.index(run)].tolist())

    def _whose_turn(self, canvas: Canvas, step: Step) -> Step:
        """Those rows of a step that may be fed at once: the higher priority first, then one row of each group, that which
        was served least first, then another of each. At least one."""
        at_work = step.rows.tolist()
        copies = 1 + (canvas.cfg_scale[step.rows] != 0).long()
        if int(((canvas.stop - canvas.first)[step.rows] * copies).sum()) <= self.max_tokens:
            return step  # all of them as a whole
        fed = [
            (feeding.columns.end - feeding.columns.begin) * count
            for feeding, count in zip(columns_to_feed(canvas, step), copies.tolist(), strict=True)
        ]
        seen: Counter[Group] = Counter()
        places: dict[int, tuple[int, int, int]] = {}
        for place in sorted(range(len(fed)), key=lambda place: self.runs[at_work[place]].served):
            group = self.runs[at_work[place]].group
            places[place] = (-group.priority, seen[group], group.served)
            seen[group] += 1
        room = self.max_tokens
        chosen: list[int] = []
        for place in sorted(places, key=lambda place: places[place]):
            if chosen and fed[place] > room:
                break
            chosen.append(place)
            room -= fed[place]
        return step.of(torch.tensor(sorted(chosen)))

    def _advance(self, canvas: Canvas, step: Step, fail: Callable[[Run, Exception], None]) -> list[int]:
        """The rows that the forward brought on. Where it fails, each row is tried alone."""
        try:
            if self._damage is not None:
                raise FloatingPointError(self._damage)
            logits = forward(self.model, canvas, step, self._prefixes, batch_invariant=self.batch_invariant)
        except Exception as error:
            if len(step.rows) == 1:
                fail(self.runs[int(step.rows[0])], error)
                return []
            return [row for one, _ in _row_by_row(step) for row in self._advance(canvas, one, fail)]
        return self._commit(canvas, step, logits, fail)

    def _commit(
        self, canvas: Canvas, step: Step, logits: Tensor, fail: Callable[[Run, Exception], None]
    ) -> list[int]:
        """The rows whose logits (N, V) could be committed. Where some are no numbers, or are all ruled out, the others need
        no other forward, which may not give the same (cache.py)."""
        try:
            commit(canvas, step, logits)
            return step.rows.tolist()
        except (FloatingPointError, UserError) as error:  # before anything was written
            if len(step.rows) == 1:
                fail(self.runs[int(step.rows[0])], error)
                return []
        return [row for one, own in _row_by_row(step) for row in self._commit(canvas, one, logits[own], fail)]


def _row_by_row(step: Step) -> Iterator[tuple[Step, slice]]:
    """A step for each row of a step, and which of its logits belong to it."""
    end = 0
    for row, count in enumerate(step.where.sum(1).tolist()):
        begin, end = end, end + count
        yield step.of(torch.tensor([row])), slice(begin, end)


def cache_bytes(model: Model, config: SamplingConfig, length: int) -> int:
    """What the keys and values of a row of this length take."""
    if not takes_packed_rows(model):
        return 0
    return row_bytes(config, model.config, length, model.embed.weight.itemsize)
