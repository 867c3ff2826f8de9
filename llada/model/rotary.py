"""Rotary positions (RoFormer, arXiv 2104.09864) in float32, and how a network was stretched over a longer context than the one
that it learned them in.

Every kind of stretching is one formula: of the frequency of each pair of columns a share is kept, and the rest divided by a
factor. What turns often within the original context is kept, as it tells neighbours apart; what has never turned around is
slowed down.

Shape legend: E head width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llada.settings import check_limits, limited, require


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched over a longer context than they were learned in. Settings of another kind are refused."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """Every frequency divided by `factor` (linear: Position Interpolation, arXiv 2306.15595), or the slow ones alone, by their
    turns within the original context (llama3: Llama 3.1 and later; yarn: YaRN, arXiv 2309.00071, §3)."""
    factor: float | None = limited(None, low=1)
    """How many times the original context is to be covered."""
    original_length: int | None = limited(None, low=1)
    """Positions of the original context. (llama3, yarn)"""
    low_freq_factor: float | None = limited(None, above=0)
    """What turns so often or more rarely within it is divided by `factor`; of what turns more often, evenly more is kept. (llama3)"""
    high_freq_factor: float | None = limited(None, above=0)
    """What turns so often is kept. (llama3)"""
    beta_fast: float | None = limited(None, above=0)
    """The same, for a range that is even over the columns; None: 32. (yarn)"""
    beta_slow: float | None = limited(None, above=0)
    """What turns so often or more rarely is divided by `factor`; None: 1. (yarn)"""
    attention_factor: float | None = limited(None, above=0)
    """Queries and keys are multiplied by it; None: 0.1 · ln(factor) + 1. (yarn)"""

    def __post_init__(self) -> None:
        check_limits(self, "model.rope_scaling")
        needed, optional = _SETTINGS[self.kind]
        for name, value in asdict(self).items():
            require(
                value is None or name in ("kind", *needed, *optional),
                f"model.rope_scaling: {name} is not of kind {self.kind}: leave it out",
            )
        for name in needed:
            require(getattr(self, name) is not None, f"model.rope_scaling: kind {self.kind} needs {name}")
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            require(
                low < high,  # type: ignore[operator]
                f"model.rope_scaling: low_freq_factor {low} must be below high_freq_factor {high}",
            )
        require(
            self.kind != "yarn" or self.turns[0] > self.turns[1],
            f"model.rope_scaling: beta_fast {self.turns[0]} must be above beta_slow {self.turns[1]}",
        )

    def content(self) -> dict[str, Any]:
        """The settings as files and hashes hold them: those that are set; none where nothing is stretched."""
        if self.kind == "none":
            return {}
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def turns(self) -> tuple[float, float]:
        """yarn's beta_fast and beta_slow."""
        return self.beta_fast or 32.0, self.beta_slow or 1.0

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by, for queries and keys each (YaRN, §3.4)."""
        if self.kind != "yarn":
            return 1.0
        assert self.factor is not None
        return self.attention_factor or 0.1 * math.log(self.factor) + 1.0


# kind -> its settings: those that it needs, and those that have values of their own.
_SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "original_length", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor", "original_length"), ("beta_fast", "beta_slow", "attention_factor")),
}
UNSCALED = RopeScaling()


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling = UNSCALED, device: torch.device | None = None
) -> Tensor:
    """(E/2,) float32: radians per position of each pair of columns, from the fastest on."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    if scaling.kind == "none":
        return frequency
    assert scaling.factor is not None
    kept = _share_kept(frequency, theta, scaling)
    return frequency * kept + frequency / scaling.factor * (1 - kept)


def _share_kept(frequency: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """(E/2,) float32 in [0, 1]."""
    if scaling.kind == "linear":
        return torch.zeros_like(frequency)
    assert scaling.original_length is not None
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None
        assert high is not None
        turns = scaling.original_length * frequency / (2 * math.pi)
        return ((turns - low) / (high - low)).clamp(0, 1)
    # Between the pairs (rounded outwards, as YaRN's code has it) that turn `fast` and `slow` times.
    head_dim = 2 * len(frequency)
    fast, slow = (
        head_dim * math.log(scaling.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))
        for turns in scaling.turns
    )
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), head_dim - 1)
    pair = torch.arange(len(frequency), device=frequency.device, dtype=torch.float32)
    return 1 - ((pair - first) / (last - first or 0.001)).clamp(0, 1)


def rotary_table(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling = UNSCALED
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (…, E) float32, of the positions (…) in the rotate-half layout."""
    angle = positions[..., None].float() * frequencies(head_dim, theta, scaling, positions.device)
    angle = torch.cat([angle, angle], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if scaling.amplitude == 1 else (cos * scaling.amplitude, sin * scaling.amplitude)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (…, H, E), computed in float32 and cast back."""
    x32 = x.float()
    left, right = x32.chunk(2, dim=-1)
    return (x32 * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)
