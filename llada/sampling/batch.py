"""Replies on one canvas, walked together: who joins, whose turn it is, who leaves.

A forward is fed `max_tokens` at the most, of rows whatever their lengths, settings and progress. Where not all fit, turns go
round between groups, not between the rows that one of them has: who has 32 gets no more of the network than who has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llada.model.predict import Model, takes_packed_rows
from llada.sampling.cache import row_bytes
from llada.sampling.canvas import Canvas, Step
from llada.sampling.config import SamplingConfig
from llada.sampling.forward import columns_to_feed
from llada.sampling.reply import Reply
from llada.sampling.sampler import plan
from llada.sampling.trace import Trace, read_trace


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
    fed: int  # tokens that were fed to the network for it in this turn
    block: int  # that it works on


class Batch:
    """The canvas and whose its rows are."""

    def __init__(self, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.runs: list[Run] = []
        self.canvas: Canvas | None = None
        """A row for each of the runs; None: there are none."""
        self._given_whole: list[int] = []

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
        self.canvas = Canvas.join([*([self.canvas] if self.canvas is not None else []), *canvases])

    def keep(self, wanted: Callable[[Run], bool]) -> None:
        """Take all other replies off the canvas."""
        rows = [row for row, run in enumerate(self.runs) if wanted(run)]
        if len(rows) == len(self.runs):
            return
        for row in set(range(len(self.runs))).difference(rows):
            self.runs[row].group.on_canvas -= 1
        self.runs = [self.runs[row] for row in rows]
        assert self.canvas is not None
        self.canvas = self.canvas.take(rows) if rows else None

    def plan(self) -> Step | None:
        """What the next forward is for: the rows whose turn it is. None: no row has a mask."""
        if self.canvas is None:
            return None
        step = plan(self.canvas)
        # A row may be given whole, when all its positions are fixed.
        self._given_whole = sorted(set(range(len(self.runs))).difference(step.rows.tolist() if step else ()))
        return None if step is None else self._whose_turn(self.canvas, step)

    def progress(self, brought_on: Sequence[int]) -> Iterator[Progress]:
        """What the forward did for each of the rows that it has brought on, and what those are that need none. A reply that
        has ended must be taken off before the next `plan`."""
        canvas = self.canvas
        if canvas is None:
            return
        fed, final, forwards = canvas.token_forwards.tolist(), canvas.final_until(), canvas.forwards.tolist()
        blocks = canvas.block.tolist()
        for row in [*self._given_whole, *brought_on]:
            run = self.runs[row]
            new = fed[row] - run.fed
            run.group.served += new
            run.served += new
            run.fed = fed[row]
            yield Progress(run, canvas.tokens[row], final[row], forwards[row], new, blocks[row])

    def trace(self, run: Run, begin: int, end: int) -> Trace:
        """How the tokens in these columns of a row that is traced came to be there."""
        assert self.canvas is not None
        return read_trace(self.canvas, self.runs.index(run), begin, end)

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


def cache_bytes(model: Model, config: SamplingConfig, length: int) -> int:
    """What the keys and values of a row of this length take."""
    if not takes_packed_rows(model):
        return 0
    return row_bytes(config, model.config, length, model.embed.weight.itemsize)
