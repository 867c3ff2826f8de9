"""The knobs of the sampler, each declared once: its default, its limits, its documentation, and who may set it.

`generate`, `infill`, the command line, the endpoint's defaults and the HTTP body are all derived from `SamplingConfig`.
This file imports no torch, so that the HTTP front process can read the knobs and stay small.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any

from llada.settings import check_limits, limited


def knob(
    default: Any, *, per_request: bool = True, request_high: float | None = None, **limits: float
) -> Any:
    """A field of `SamplingConfig`. `per_request`: a client of the endpoint may set it, up to `request_high`."""
    return limited(default, per_request=per_request, request_high=request_high, **limits)


@dataclass(frozen=True)
class SamplingConfig:
    """How to walk the canvas. Names and defaults as in LLaDA's generate.py; at most one parallel rule may be set."""

    gen_length: int = knob(128, low=1, per_request=False)
    """Masks behind the prompt."""
    steps: int | None = knob(128, low=1, request_high=4096)
    """Forwards over the whole canvas, shared out among the blocks that hold masks; None takes one for each mask."""
    block_length: int = knob(128, low=1)
    """Blocks are finished left to right; the last one may be short."""
    temperature: float = knob(0.0, low=0, request_high=2)
    """Of the Gumbel noise; 0 is greedy. Ignored by "ancestral", which samples at 1."""
    cfg_scale: float = knob(0.0, low=0)
    """Strength of the classifier-free guidance, which doubles a forward; 0 is off."""
    remasking: str = knob("low_confidence")
    """What to commit at a step: the most certain ("low_confidence"), any ("random", both LLaDA's), or by coin with the
    model's own distribution ("ancestral", MDLM's); see llada/sampling/rules.py."""
    threshold: float | None = knob(None, low=0, high=1)
    """Commit every confidence of at least this, and the highest in any case (Fast-dLLM)."""
    factor: float | None = knob(None, low=0)
    """Commit the n highest confidences while the n-th is at least 1 − factor / (n + 1) (Fast-dLLM)."""
    entropy_bound: float | None = knob(None, low=0)
    """Commit the most certain positions while their dependence is bounded by this many nats (EB-Sampler)."""
    schedule: str = knob("loglinear", per_request=False)
    """Noise schedule of "ancestral": how many masks should be left at each step."""

    def __post_init__(self) -> None:
        check_limits(self, "sampling")
        # Here and not above: both need torch, which a process that only reads the knobs does without.
        from llada.diffusion.schedule import get_schedule
        from llada.sampling.rules import find_rule

        find_rule(self)
        get_schedule(self.schedule)


def request_knobs() -> list[Field[Any]]:
    """The knobs that a client of the endpoint may set."""
    return [field for field in fields(SamplingConfig) if field.metadata["per_request"]]
