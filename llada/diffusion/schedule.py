"""Noise schedules: α(t), the probability that a token is still clean at time t, and the weight of the bound.

MDLM (arXiv 2406.07524, Table 9 and App. E) writes them as α = exp(−σ). LLaDA (arXiv 2502.09992, Eq. 3) is the straight
line. Every function takes and returns tensors of t's shape and dtype, elementwise; use float64 near the ends.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from llada.registry import Registry


class NoiseSchedule(ABC):
    """α falls from about 1 at t = 0 to about 0 at t = 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Total noise σ(t) = −log α(t)."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """dσ/dt = −α′/α."""

    @abstractmethod
    def time_at(self, mask_prob: Tensor) -> Tensor:
        """The time t at which the mask probability is `mask_prob`: the inverse of `mask_prob(t)`."""

    def alpha(self, t: Tensor) -> Tensor:
        """P(still clean at t)."""
        return torch.exp(-self.sigma(t))

    def mask_prob(self, t: Tensor) -> Tensor:
        """P(masked at t) = 1 − α(t), without cancellation at small t."""
        return -torch.expm1(-self.sigma(t))

    def weight(self, t: Tensor) -> Tensor:
        """−α′(t) / (1 − α(t)): the continuous-time bound's weight on −log p at a masked position (MDLM Eq. 10)."""
        return self.dsigma(t) / torch.expm1(self.sigma(t))

    def mass(self, t_min: float, t_max: float) -> float:
        """∫ weight · mask_prob dt over [t_min, t_max]: how often, by weight, a position is predicted."""
        ends = self.alpha(torch.tensor([t_min, t_max], dtype=torch.float64))
        return float(ends[0] - ends[1])


@dataclass(frozen=True)
class LLaDA(NoiseSchedule):
    """mask_prob = (1 − ε)t + ε with weight 1 / mask_prob (LLaDA's GUIDELINES; ε keeps the weight finite).

    The bound's own weight would be (1 − ε)/p; LLaDA drops the constant, so the weights average to exactly 1.
    """

    eps: float = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-self.mask_prob(t))

    def dsigma(self, t: Tensor) -> Tensor:
        return (1 - self.eps) / self.alpha(t)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.mask_prob(t)

    def mask_prob(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * t + self.eps

    def weight(self, t: Tensor) -> Tensor:
        return 1 / self.mask_prob(t)

    def mass(self, t_min: float, t_max: float) -> float:
        return t_max - t_min

    def time_at(self, mask_prob: Tensor) -> Tensor:
        return (mask_prob - self.eps) / (1 - self.eps)


@dataclass(frozen=True)
class LogLinear(NoiseSchedule):
    """mask_prob = (1 − ε)t; the weight is exactly 1/t (MDLM's default)."""

    eps: float = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - self.eps) * t)

    def dsigma(self, t: Tensor) -> Tensor:
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def time_at(self, mask_prob: Tensor) -> Tensor:
        return mask_prob / (1 - self.eps)

    def mask_prob(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * t

    def weight(self, t: Tensor) -> Tensor:
        return 1 / t


@dataclass(frozen=True)
class Cosine(NoiseSchedule):
    """α = ε + (1 − ε)cos(πt/2)^power; power 2 is MDLM's cosine²."""

    power: int = 1
    eps: float = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log(self.alpha(t))

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.mask_prob(t)

    def mask_prob(self, t: Tensor) -> Tensor:
        # 1 − cos(πt/2) = 2 sin²(πt/4) and 1 − cos² = sin²: exact where 1 − α would cancel.
        if self.power == 1:
            return (1 - self.eps) * 2 * torch.sin(math.pi / 4 * t).square()
        return (1 - self.eps) * torch.sin(math.pi / 2 * t).square()

    def _slope(self, t: Tensor) -> Tensor:
        """−α′(t)."""
        if self.power == 1:
            return math.pi / 2 * (1 - self.eps) * torch.sin(math.pi / 2 * t)
        return math.pi / 2 * (1 - self.eps) * torch.sin(math.pi * t)

    def dsigma(self, t: Tensor) -> Tensor:
        return self._slope(t) / self.alpha(t)

    def weight(self, t: Tensor) -> Tensor:
        return self._slope(t) / self.mask_prob(t)

    def time_at(self, mask_prob: Tensor) -> Tensor:
        share = (mask_prob / (1 - self.eps)).clamp(0, 1)
        if self.power == 1:
            return 4 / math.pi * torch.asin((share / 2).sqrt())
        return 2 / math.pi * torch.asin(share.sqrt())


@dataclass(frozen=True)
class Linear(NoiseSchedule):
    """σ linear in t (MDLM's "linear", the schedule of D3PM-style variance-preserving noise)."""

    sigma_min: float = 1e-3
    sigma_max: float = 7.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_max - self.sigma_min)

    def time_at(self, mask_prob: Tensor) -> Tensor:
        return (-torch.log1p(-mask_prob) - self.sigma_min) / (self.sigma_max - self.sigma_min)


@dataclass(frozen=True)
class Geometric(NoiseSchedule):
    """σ = σ_min^(1−t) · σ_max^t (SEDD, MDLM)."""

    sigma_min: float = 1e-3
    sigma_max: float = 1.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def dsigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def time_at(self, mask_prob: Tensor) -> Tensor:
        sigma = -torch.log1p(-mask_prob)
        return torch.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class Constant(NoiseSchedule):
    """BERT's fixed mask rate: a baseline, not a bound. Weight 1/p, so that the loss is a mean over masked tokens."""

    p: float = 0.15

    def sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -math.log1p(-self.p))

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def mask_prob(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.p)

    def weight(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 / self.p)

    def mass(self, t_min: float, t_max: float) -> float:
        return t_max - t_min

    def time_at(self, mask_prob: Tensor) -> Tensor:
        return torch.full_like(mask_prob, 0.5)


SCHEDULES: Registry[NoiseSchedule] = Registry(
    "noise schedule",
    {
        "llada": LLaDA(),
        "loglinear": LogLinear(),
        "cosine": Cosine(power=1),
        "cosine2": Cosine(power=2),
        "linear": Linear(),
        "geometric": Geometric(),
        "bert": Constant(),
    },
)
"""By name, with the published constants. A new one is a class above and a row here."""


def get_schedule(schedule: str | NoiseSchedule) -> NoiseSchedule:
    """A schedule by name; an instance passes through. Raises UserError for an unknown name."""
    return schedule if isinstance(schedule, NoiseSchedule) else SCHEDULES.find(schedule)
