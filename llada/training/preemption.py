"""Leaving in good order: a worker that is asked to go takes all others along, at the same step, behind a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from llada.training.parallel import world


class PreemptedError(Exception):
    """The run was asked to leave. Its newest checkpoint is that of the step where it did."""


class Departure:
    """Whether any worker is asked to leave: each says so once a step, and all hear it one step later.

    So nobody waits: the sum of a step's answers is formed by a group of CPUs while the next step is computed, and the device
    is not asked. All workers get the same answer at the same step.

    Args:
        should_stop: whether this worker is asked to leave; None (on all workers): none ever is.
    """

    def __init__(self, should_stop: Callable[[], bool] | None) -> None:
        self.should_stop = should_stop
        self._group = dist.new_group(backend="gloo") if should_stop and world()[1] > 1 else None
        self._answers = torch.zeros(1, dtype=torch.int32)
        self._sum: dist.Work | None = None

    def agreed(self) -> bool:
        """Whether all leave behind this step. A collective, once in each step."""
        if self.should_stop is None:
            return False
        if self._group is None:
            return self.should_stop()
        if self._sum is not None:
            self._sum.wait()
        is_agreed = bool(self._answers.item())
        self._answers.fill_(self.should_stop())
        self._sum = dist.all_reduce(self._answers, group=self._group, async_op=True)
        return is_agreed
