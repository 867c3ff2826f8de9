"""What a training log says beside the loss: tokens per second, model FLOPs utilisation (MFU), peaks of memory, and the loss by
noise level."""

from __future__ import annotations

import functools
import math
import resource
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from llada.hardware import recognise

GIB = 1 << 30
_PEAK_S = 0.3


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that 100 % MFU would be: the data sheet for known accelerators, a measured matrix product otherwise."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        accelerator = recognise(torch.cuda.get_device_name(device))
        if accelerator is not None:
            return accelerator.bf16_flops
    size = 512 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, began = math.inf, time.perf_counter()
    # For so long that whoever else has the processor for a moment does not make it look slow.
    while time.perf_counter() - began < _PEAK_S:
        start = time.perf_counter()
        # The product of a layer: on CPUs a @ a has no fast way in bfloat16. `.item()` waits for the device.
        torch.nn.functional.linear(a, a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Speed(NamedTuple):
    """What has been done since the last reading."""

    tokens_per_second: float
    """Of all workers together."""
    mfu: float
    """Model FLOPs utilisation, in [0, 1]."""
    tokens_per_second_per_worker: float
    data_wait: float
    """Share of the time in which the loop waited for its next batch, in [0, 1]."""


class Throughput:
    """Counts tokens and time.

    Args:
        flops_per_token: of the forward and backward pass.
        peak: FLOP/s of one worker's device at full use.
    """

    def __init__(self, flops_per_token: float, peak: float, num_workers: int) -> None:
        self.flops_per_token, self.peak, self.num_workers = flops_per_token, peak, num_workers
        self.tokens, self.since = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        """Tokens of all workers that were trained on."""
        self.tokens += tokens

    def read(self, waited: float) -> Speed:
        """The speed since the last reading, of which `waited` seconds brought no batch; the count begins anew."""
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        rate = self.tokens / seconds
        self.tokens, self.since = 0, now
        each = rate / self.num_workers
        return Speed(rate, each * self.flops_per_token / self.peak, each, waited / seconds)


class Memory(NamedTuple):
    """The most that one worker has needed, GiB."""

    allocated_gib: float
    """By tensors on its GPU; on a CPU, by its whole process."""
    reserved_gib: float
    """By torch on its GPU; on a CPU the same as `allocated_gib`."""


def peak_memory(device: torch.device) -> Memory:
    """The peaks of this worker since the last call (on a CPU since its process has begun)."""
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return Memory(*(peak / GIB for peak in peaks))
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return Memory(resident, resident)


class ByNoise(NamedTuple):
    """The loss by the part of [0, 1] in which the mask probability lies; empty where nothing is masked."""

    nats: tuple[float, ...]
    """Mean −log p of a masked token; 0 where there was none."""
    tokens: tuple[int, ...]
    """How many."""


def add_up(sums: Sequence[float], more: Sequence[float]) -> tuple[float, ...]:
    """The sums of two intervals; () stands for zeros."""
    return tuple(a + b for a, b in zip(sums or [0.0] * len(more), more, strict=True))


def mean_by_noise(sums: Sequence[float]) -> ByNoise:
    """Of (Σ −log p, number) of each part, one part after the other."""
    nats, tokens = sums[::2], sums[1::2]
    if not any(tokens):
        return ByNoise((), ())
    means = tuple(total / number if number else 0.0 for total, number in zip(nats, tokens, strict=True))
    return ByNoise(means, tuple(map(int, tokens)))
