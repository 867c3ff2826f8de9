"""How many replicas a request rate takes: each forward of the sampler is counted, as llada/sampling/cache.py feeds it.

A replica works as fast as its arithmetic or its memory lets it. Without a cache a forward is of the whole canvas and
arithmetic decides from the first request on; with one a forward is of a block, all weights are read for it, and requests
that share forwards share that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llada.config import Recipe
from llada.hardware import ACCELERATORS

MFU = (0.15, 0.45)
"""Of forwards alone: an assumption. tests/benchmarks/gpu_sample.py measures tokens per second."""
LOAD = 0.7
"""How busy a replica is on average: what is above makes queues (an M/M/1 queue is 3.3 services long at 0.7, 9 at 0.9)."""
_BF16 = 2


@dataclass(frozen=True)
class ServingPlan:
    """Pairs are (fewest or shortest, most or longest), by `MFU`."""

    requests_per_second: float
    prompt_tokens: int
    gen_length: int
    forwards: float
    """Of one request."""
    token_forwards: float
    """Tokens fed to the network for one request."""
    gpu_seconds: tuple[float, float]
    """Of one request."""
    replicas: tuple[int, int]
    weights_bytes: float
    fits: bool
    """Into the memory of one GPU."""
    gpu: str


def plan_serving(
    recipe: Recipe,
    *,
    gpu: str,
    requests_per_second: float,
    prompt_tokens: int,
    tokens_per_forward: float | None = None,
    concurrency: int = 8,
) -> ServingPlan:
    """Replicas of one GPU each, with `recipe.sampling`.

    Args:
        tokens_per_forward: that a parallel rule commits; None: as many as `steps` makes it.
        concurrency: requests that share forwards (max_ongoing_requests of the endpoint).
    """
    accelerator, sampling, model = ACCELERATORS.find(gpu.lower()), recipe.sampling, recipe.model
    length, block = sampling.gen_length, min(sampling.block_length, sampling.gen_length)
    canvas = prompt_tokens + length
    forwards = length / tokens_per_forward if tokens_per_forward else float(sampling.steps or length)
    blocks = math.ceil(length / block)
    if model.block_length is None and sampling.cache is None:
        fed = forwards * canvas
    else:
        # At a block's beginning the whole canvas; then the block, or with the prefix alone kept all behind it.
        behind = length / 2 if sampling.cache == "prefix" else block
        fed = blocks * canvas + max(0.0, forwards - blocks) * behind
    guided = 2 if sampling.cfg_scale else 1
    flops = guided * fed * model.training_flops_per_token(canvas) / 3  # a forward is a third of it
    weights = _BF16 * model.num_parameters
    reading = guided * forwards * weights / accelerator.bytes_per_second / concurrency
    low, high = (max(flops / accelerator.bf16_flops / mfu, reading) for mfu in reversed(MFU))
    return ServingPlan(
        requests_per_second=requests_per_second,
        prompt_tokens=prompt_tokens,
        gen_length=length,
        forwards=guided * forwards,
        token_forwards=guided * fed,
        gpu_seconds=(low, high),
        replicas=(
            math.ceil(requests_per_second * low / LOAD),
            math.ceil(requests_per_second * high / LOAD),
        ),
        weights_bytes=weights,
        fits=weights < 0.8 * accelerator.memory_gib * 1024**3,
        gpu=gpu.lower(),
    )
