"""What a training log says about speed: tokens per second and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import functools
import math
import time
from typing import NamedTuple

import torch

from llada.hardware import recognise


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that 100 % MFU would be: the data sheet for known accelerators, a measured matrix product otherwise."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        accelerator = recognise(torch.cuda.get_device_name(device))
        if accelerator is not None:
            return accelerator.bf16_flops
    size = 512 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        (a @ a).sum().item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Speed(NamedTuple):
    """What all workers together have done since the last reading."""

    tokens_per_second: float
    mfu: float
    """Model FLOPs utilisation, in [0, 1]."""


class Throughput:
    """Counts tokens and time."""

    def __init__(self, flops_per_token: float, peak_flops_all_workers: float) -> None:
        self.flops_per_token, self.peak = flops_per_token, peak_flops_all_workers
        self.tokens, self.since = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        """Tokens of all workers that were trained on."""
        self.tokens += tokens

    def read(self) -> Speed:
        """The speed since the last reading; the count begins anew."""
        now = time.perf_counter()
        rate = self.tokens / max(now - self.since, 1e-9)
        self.tokens, self.since = 0, now
        return Speed(rate, rate * self.flops_per_token / self.peak)
