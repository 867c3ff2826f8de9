"""What a training log says about speed: tokens per second and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import functools
import math
import time

import torch

# Dense bf16 FLOP/s of one device, from the vendors' data sheets.
PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that 100 % MFU would be: the data sheet for known accelerators, a measured matrix product otherwise."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, flops in PEAK_BF16_FLOPS.items():
            if known in name:
                return flops
    size = 512 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        (a @ a).sum().item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Throughput:
    """Tokens per second and MFU since the last reading."""

    def __init__(self, flops_per_token: float, peak_flops_all_workers: float) -> None:
        self.flops_per_token, self.peak = flops_per_token, peak_flops_all_workers
        self.tokens, self.since = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        self.tokens += tokens

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        rate = self.tokens / max(now - self.since, 1e-9)
        self.tokens, self.since = 0, now
        return {"tokens_per_second": rate, "mfu": rate * self.flops_per_token / self.peak}
