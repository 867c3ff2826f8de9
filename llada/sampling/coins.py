"""Rules that toss coins: at which step of its block each position is unmasked, whatever the network says.

The process that masked diffusion is trained on is reversed position by position, with chances that are a function of
the schedule alone (MDLM, arXiv 2406.07524; ReMDM, arXiv 2503.00307, which lets tokens go back to the mask). So the coins of
all steps are tossed at once, one number for each wait, and the steps at which nothing happens cost no forward.

Shape legend: B rows, b of them, L columns, S steps of a block.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llada.diffusion.noise import row_keys, stream_key, uniforms_of
from llada.diffusion.schedule import NoiseSchedule, get_schedule

if TYPE_CHECKING:
    from llada.sampling.canvas import Canvas

_COIN, _SHIFT = stream_key(0, "coin"), stream_key(0, "shift")
NEVER = 1 << 62
"""A step that does not come."""
_SURE = -40.0  # the log of a chance that no number of 53 bits meets


def due_by_coin(canvas: Canvas) -> Tensor:
    """MDLM's reverse process: at each step of its block a mask goes with its own coin, at the last one in any case.

    A coin per step is one uniform number per position: it is due at the first step by which P(unmasked) exceeds it.
    """
    uniform = _coins(canvas)
    steps = canvas.steps_of.gather(1, canvas.block_of)
    schedule = get_schedule(canvas.configs[0].schedule)  # all rows of a new canvas have the same
    due = torch.zeros_like(canvas.tokens)
    for count in steps.unique().tolist():
        here = steps == count
        by = unmasked_by(schedule, count)
        due[here] = torch.searchsorted(by, uniform[here], right=True)
    return due


def _coins(canvas: Canvas) -> Tensor:
    """(B, L): a number in [0, 1) for each position; with `stratified` those of a block's masks are spread evenly."""
    keys = row_keys(_COIN, canvas.seed_keys)
    uniform = uniforms_of(row_keys(keys[:, None], canvas.position))
    if not (len(canvas) and canvas.configs[0].stratified):
        return uniform
    blocks = canvas.steps_of.shape[1]
    masks = (canvas.tokens == canvas.mask_id) & canvas.attended
    group = (torch.arange(len(canvas))[:, None] * blocks + canvas.block_of)[masks]
    shift = uniforms_of(row_keys(row_keys(_SHIFT, canvas.seed_keys)[:, None], torch.arange(blocks)))
    return uniform.masked_scatter(masks, spread(uniform[masks], group, shift.flatten()))


def spread(uniform: Tensor, group: Tensor, shift: Tensor) -> Tensor:
    """Low-discrepancy numbers (N,) from independent ones: in each group of n, one in every n-th part of [0, 1).

    The i-th smallest of a group becomes (i + shift) / n, a systematic sample in random order: each number alone is
    uniform as before, and of the n there are ⌊nx⌋ or ⌈nx⌉ below any x, so that their count varies as little as a whole
    number can.

    Args:
        uniform: (N,) in [0, 1).
        group: (N,) to which group a number belongs.
        shift: (groups,) in [0, 1).
    """
    order = uniform.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    size = torch.bincount(group, minlength=len(shift))
    begin = size.cumsum(0) - size
    place = torch.empty_like(group)
    place[order] = torch.arange(len(group)) - begin[group[order]]
    return (place + shift[group]) / size[group]


def unmasked_by(schedule: NoiseSchedule, steps: int) -> Tensor:
    """(S,) float64: P(a mask is unmasked at the latest at step 0, 1, …) when time goes from 1 to 0 in equal steps."""
    times = 1 - torch.arange(1, steps + 1, dtype=torch.float64) / max(1, steps)
    by = unmask_probability(schedule, torch.ones_like(times), times)
    by[-1:] = 1.0  # schedules that do not reach α = 1 at time 0 leave a rest to the last step
    return by


def unmask_probability(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Tensor:
    """P(a mask is unmasked on the way from time t to s < t) = (α_s − α_t) / (1 − α_t) (MDLM Eq. 7), elementwise."""
    return 1 - schedule.mask_prob(s) / schedule.mask_prob(t)


class Chances(NamedTuple):
    """Of each step of a block, (S,) float64."""

    unmask: Tensor
    """P(a mask is unmasked)."""
    remask: Tensor
    """P(a token becomes a mask again)."""


def remdm_chances(schedule: NoiseSchedule, steps: int, cap: float) -> Chances:
    """ReMDM-cap's (arXiv 2503.00307, §3 and §4.1): a token goes back with σ = min(cap, (1 − α_s) / α_t), and a mask is
    unmasked with (α_s − (1 − σ) α_t) / (1 − α_t), so that as many masks are left at each time as without. The last step
    unmasks all."""
    times = 1 - torch.arange(steps + 1, dtype=torch.float64) / max(1, steps)
    masked_t, masked_s = schedule.mask_prob(times[:-1]), schedule.mask_prob(times[1:])
    remask = (masked_s / (1 - masked_t)).clamp(max=cap)
    unmask = 1 - masked_s / masked_t + remask * (1 - masked_t) / masked_t
    unmask[-1:], remask[-1:] = 1.0, 0.0
    return Chances(unmask.clamp(0, 1), remask)


@lru_cache(maxsize=16)
def _waits(schedule: str, steps: int, cap: float | None) -> Chances:
    """−log P(that it has not happened by step 0, 1, …) of both, with what is sure at a number that can be reckoned with."""
    chances = remdm_chances(get_schedule(schedule), steps, cap or 0.0)
    return Chances(*(-torch.log1p(-chance).clamp(min=_SURE).cumsum(0) for chance in chances))


def _next(wait: Tensor, after: Tensor, uniform: Tensor) -> Tensor:
    """(n,): the first step after the steps (n,) at which it happens; S if at none."""
    passed = torch.nn.functional.pad(wait, (1, 0))[after + 1]
    return torch.searchsorted(wait, passed - torch.log1p(-uniform), right=True)


def due_by_remdm(canvas: Canvas) -> Tensor:
    """The step at which each position is unmasked first."""
    uniform = _coins(canvas)
    steps = canvas.steps_of.gather(1, canvas.block_of)
    due = torch.zeros_like(canvas.tokens)
    for count in steps.unique().tolist():
        here, config = steps == count, canvas.configs[0]
        due[here] = _next(
            _waits(config.schedule, count, config.remdm_cap).unmask, due[here] - 1, uniform[here]
        )
    return due


def return_by_remdm(canvas: Canvas, rows: Tensor, committed: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens `committed` (b, L) at these rows' (b,) present step: at which step they become masks again (NEVER if at
    none), and at which those are unmasked; each (n,), in row-major order."""
    row, column = committed.nonzero(as_tuple=True)
    row = rows[row]
    now = canvas.due[row, column]
    keys = row_keys(row_keys(row_keys(_COIN, canvas.seed_keys[row]), canvas.position[row, column]), now)
    lost, found = uniforms_of(keys), uniforms_of(row_keys(_SHIFT, keys))
    steps = canvas.steps_of[row, canvas.block_of[row, column]]
    again, due = torch.full_like(now, NEVER), torch.full_like(now, NEVER)
    kinds = [(canvas.configs[r].schedule, canvas.configs[r].remdm_cap) for r in row.tolist()]
    for kind in dict.fromkeys(kinds):
        same = torch.tensor([other == kind for other in kinds])
        for count in steps[same].unique().tolist():
            here = (same & (steps == count)).nonzero().squeeze(1)
            waits = _waits(kind[0], count, kind[1])
            back = _next(waits.remask, now[here], lost[here])
            here, back = here[back < count], back[back < count]
            again[here] = back
            due[here] = _next(waits.unmask, back, found[here])
    return again, due
