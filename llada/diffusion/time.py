"""Which noise level each sample of a batch gets, and what that does to its weight.

Three ways to draw u in [0, 1), three maps from u to t, a bandwidth [t_min, t_max], and the weight that keeps the loss
unbiased for each of them: with density q over the bandwidth and Z = `schedule.mass(t_min, t_max)`, the weight
schedule.weight(t) / (q(t) · Z) makes E[weight × masked] = 1 at every position. For LLaDA over [0, 1] that is exactly its 1/p.
In discrete time T levels take the place of the density (MDLM, arXiv 2406.07524, Eq. 7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llada.diffusion.noise import shift_right, stream_key, uniforms
from llada.diffusion.schedule import NoiseSchedule
from llada.errors import UserError
from llada.settings import check_limits, limited, require

TimeSampling = Literal["stratified", "independent", "sobol"]
TimeDensity = Literal["uniform", "importance", "bell"]


@dataclass(frozen=True)
class TimeConfig:
    """How t is drawn. `t_min`, `t_max` are its bandwidth: training sees no noise level outside.

    A bandwidth is BD3-LM's clipped schedule (arXiv 2503.09573, §5.3: U[0.3, 0.8] for blocks of 16) and LLaDA2's "mask ratio
    bandwidth" (arXiv 2512.15745, §5.1): nearly clean and nearly empty rows have gradients of much variance and little use.
    """

    sampling: TimeSampling = "stratified"
    """"stratified": one t in each of the global batch's equal strata (MDLM's "antithetic"); "sobol": base-2
    low-discrepancy sequence over the whole run, digitally shifted by the seed; "independent": as LLaDA's guideline."""
    density: TimeDensity = "uniform"
    """"uniform": t uniform; "importance": log(1 − α(t)) uniform, which makes the weight constant (MDLM's importance
    sampling); "bell": t normal around `bell_center`, cut off at the bandwidth's ends (arXiv 2605.13026)."""
    t_min: float = limited(0.0, low=0, high=1)
    """Lowest noise level."""
    t_max: float = limited(1.0, low=0, high=1)
    """Highest noise level."""
    bell_center: float = limited(0.5, low=0, high=1)
    """Where density "bell" is highest."""
    bell_width: float = limited(0.2, low=0.1)
    """Its standard deviation before the ends are cut off."""
    levels: int = limited(0, low=0)
    """T of discrete time: t is one of T equidistant levels, the highest of them `t_max`, and the weights are those of the bound
    over T steps. 0: continuous time."""

    def __post_init__(self) -> None:
        check_limits(self, "time")
        require(
            self.levels == 0 or self.density == "uniform",
            f"time: levels {self.levels} are uniform, which density {self.density} is not; leave one of the two out",
        )
        require(self.t_min < self.t_max, f"time: t_min {self.t_min} must be below t_max {self.t_max}")


def sample_uniform(
    sampling: TimeSampling,
    *,
    seed: int,
    step: int,
    slots: Tensor,
    batch: int,
    epochs: Tensor,
    sample_ids: Tensor,
) -> Tensor:
    """u (B,) float64 in [0, 1) for these slots of a global batch of `batch` rows.

    Stratified and Sobol depend on (seed, step, slot), independent on (seed, epoch, sample id): never on the worker. Which
    of a step's strata, or members of the sequence, a slot gets is drawn, so that any of its rows are alike together.
    """
    if sampling == "independent":
        u = torch.empty(len(sample_ids), dtype=torch.float64, device=slots.device)
        for epoch in epochs.unique().tolist():
            rows = epochs == epoch
            u[rows] = uniforms(stream_key(seed, "time", epoch), sample_ids[rows])
        return u
    # In their own order the last micro-batch of a step would have nearly all of its positions masked.
    order = uniforms(stream_key(seed, "time-order", step), torch.arange(batch, device=slots.device)).argsort()
    strata = order[slots]
    if sampling == "stratified":
        return stratify(uniforms(stream_key(seed, "time-strata", step), slots), strata, batch)
    index = step * batch + strata
    bits = _reverse_bits(index) ^ stream_key(seed, "time-sobol")
    return shift_right(bits, 11).to(torch.float64) * 2.0**-53


def stratify(u: Tensor, slots: Tensor, batch: int) -> Tensor:
    """Put u_i into stratum i of `batch` equal ones, each with noise of its own (MDLM: (u/n + i/n) mod 1)."""
    return (u + slots) / batch % 1  # in u's float64: slots / batch would be float32


def _reverse_bits(x: Tensor) -> Tensor:
    """Bit reversal of 64-bit integers: the radical inverse in base 2, i.e. the first Sobol dimension."""
    for shift, keep in (
        (1, 0x5555555555555555),
        (2, 0x3333333333333333),
        (4, 0x0F0F0F0F0F0F0F0F),
        (8, 0x00FF00FF00FF00FF),
        (16, 0x0000FFFF0000FFFF),
        (32, 0x00000000FFFFFFFF),
    ):
        x = (shift_right(x, shift) & keep) | ((x & keep) << shift)
    return x


def time_and_weight(u: Tensor, schedule: NoiseSchedule, config: TimeConfig) -> tuple[Tensor, Tensor]:
    """t (B,) and the unbiased weight (B,) of each row, both float64, from u (B,) in [0, 1).

    Raises UserError where the importance density, or discrete time, does not exist for this schedule and range.
    """
    u = u.double()
    ends = torch.tensor([config.t_min, config.t_max], dtype=torch.float64, device=u.device)
    if config.levels:
        return _discrete(u, ends, schedule, config.levels)
    mass = schedule.mass(config.t_min, config.t_max)
    if config.density == "uniform":
        t = ends[0] + u * (ends[1] - ends[0])
        return t, schedule.weight(t) * float(ends[1] - ends[0]) / mass
    if config.density == "bell":
        t, density = _bell(u, ends, config.bell_center, config.bell_width)
        return t, schedule.weight(t) / (density * mass)
    log_p = torch.log(schedule.mask_prob(ends))
    if not bool(torch.isfinite(log_p).all()) or log_p[0] == log_p[1]:
        raise UserError(
            f"time: importance density needs mask probabilities that rise from above 0; {schedule} has "
            f"{log_p.exp().tolist()} at t_min {config.t_min} and t_max {config.t_max}: raise t_min"
        )
    p = torch.exp(log_p[0] + u * (log_p[1] - log_p[0]))
    # The bound is ∫ dp/p · E[Σ −log p₀]; with log p uniform its density is 1/(p · log(p₁/p₀)), so every row weighs
    # the same, and dividing by p₁ − p₀ makes E[weight × masked] = 1.
    weight = float((log_p[1] - log_p[0]) / (log_p[1].exp() - log_p[0].exp()))
    return schedule.time_at(p), torch.full_like(p, weight)


def _discrete(u: Tensor, ends: Tensor, schedule: NoiseSchedule, levels: int) -> tuple[Tensor, Tensor]:
    """t (B,) of T levels and the weight (B,) of the bound over the step from t down to the next level s: the share (α_s − α_t) /
    (1 − α_t) of the masked tokens is restored in it, T times as often as it is drawn; Σ (α_s − α_t) is α at both ends."""
    number = (u * levels).floor().clamp(max=levels - 1)
    t, s = (torch.lerp(ends[0], ends[1], place / levels) for place in (number + 1, number))
    p, p_before = schedule.mask_prob(t), schedule.mask_prob(s)
    p_ends = schedule.mask_prob(ends)
    if p_ends[0] == p_ends[1]:
        raise UserError(
            f"time: levels {levels} need a mask probability that rises; {schedule} has the same at all: set levels to 0"
        )
    return t, levels * (p - p_before) / (p * (p_ends[1] - p_ends[0]))


def _bell(u: Tensor, ends: Tensor, center: float, width: float) -> tuple[Tensor, Tensor]:
    """The quantiles u of a normal distribution cut off at `ends` (2,), and the density there, of u's shape."""
    below = torch.special.ndtr((ends - center) / width)
    share = below[1] - below[0]
    z = torch.special.ndtri(below[0] + u * share)
    t = (center + width * z).clamp(ends[0], ends[1])  # rounding may take it a little outside
    height = 1 / (width * math.sqrt(2 * math.pi) * share)
    return t, height * torch.exp(-((t - center) / width).square() / 2)
