"""Goodput: the share of the time that a run which fails now and then spends on steps that count; and how often to save.

Failures come at random, M seconds apart on average (a Poisson process). The steps stop for δ seconds while a checkpoint is
copied, and it can be gone back to after another w seconds, when it is written, beside the steps. Between two checkpoints lie τ
seconds of steps. After a failure R seconds go by before the steps go on.

Between a restart and the next failure, X seconds later, floor((X − w) / (τ + δ)) checkpoints are finished. X is exponential,
so that is exp(−w/M) / (exp((τ + δ)/M) − 1) on average, each worth τ; and a restart, which may fail too, takes M (exp(R/M) − 1)
on average. So

    goodput = τ / M · exp(−(w + R)/M) / (exp((τ + δ)/M) − 1)

which for w = 0 is Daly's equation 13 (A higher order estimate of the optimum checkpoint interval, Future Generation Computer
Systems 22, 2006): a checkpoint that is written beside the steps costs what a longer restart would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llada.errors import UserError

MTBF_GPU_HOURS = 50_000.0
"""Of one GPU with all that belongs to it: Llama 3 had 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783,
§3.3.4), one in 50,700 GPU-hours."""


@dataclass(frozen=True)
class Failures:
    """How often a run fails, and what a checkpoint and a restart take. All in seconds.

    Raises UserError where a checkpoint or a restart would hardly ever be finished.
    """

    mtbf: float
    """M: between two failures of the whole cluster."""
    stall: float
    """δ: the steps stop while a checkpoint is copied."""
    write: float
    """w: from then on until it can be gone back to."""
    restart: float
    """R: from a failure to the next step."""

    def __post_init__(self) -> None:
        if self.stall + self.write >= self.mtbf:
            raise UserError(
                f"on this cluster something fails every {duration(self.mtbf)}, and a checkpoint takes "
                f"{duration(self.stall + self.write)}: hardly one would be finished; plan with fewer GPUs, a larger "
                "--mtbf-gpu-hours, or more bandwidth to the store"
            )
        if self.restart >= self.mtbf:
            raise UserError(
                f"on this cluster something fails every {duration(self.mtbf)}, and a restart takes {duration(self.restart)}: "
                "hardly one would be finished; plan with fewer GPUs, a larger --mtbf-gpu-hours, or a smaller --restart-s"
            )

    def goodput(self, interval: float) -> float:
        """The share of the time, in (0, 1), with a checkpoint every `interval` seconds of steps (the module's formula). The
        next one waits until the last is written, so none is nearer than that."""
        tau = max(interval, self.write)
        waits = math.exp(-(self.write + self.restart) / self.mtbf)
        return tau / self.mtbf * waits / math.expm1((tau + self.stall) / self.mtbf)

    @property
    def young(self) -> float:
        """√(2 δ M): J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (1974)."""
        return math.sqrt(2 * self.stall * self.mtbf)

    @property
    def daly(self) -> float:
        """Daly (2006), equation 37, of the interval with most goodput."""
        if self.stall >= 2 * self.mtbf:
            return self.mtbf
        ratio = self.stall / (2 * self.mtbf)
        return self.young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.stall

    @property
    def best_interval(self) -> float:
        """Daly's, and not shorter than a write."""
        return max(self.daly, self.write)

    def longest_interval(self, loss: float = 0.01) -> float:
        """The longest interval whose goodput is at most `loss` below the best one's: fewer checkpoints, nearly as good."""
        near, far = self.best_interval, 10 * self.mtbf
        enough = self.goodput(near) - loss
        for _ in range(60):
            middle = (near + far) / 2
            near, far = (middle, far) if self.goodput(middle) >= enough else (near, middle)
        return near


def duration(seconds: float) -> str:
    """As people say it: "12 min"."""
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.0f} s"
