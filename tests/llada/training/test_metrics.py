"""Throughput readings."""

import time

import pytest
import torch

from llada.training.metrics import Throughput, peak_flops


def test_throughput_counts_since_the_last_reading() -> None:
    clock = Throughput(flops_per_token=50.0, peak_flops_all_workers=1e6)
    for _ in range(2):
        clock.add(300)
        clock.add(200)
        start = clock.since
        time.sleep(0.02)
        reading = clock.read()
        elapsed = clock.since - start
        assert elapsed >= 0.02
        assert reading.tokens_per_second == pytest.approx(500 / elapsed)
        assert reading.mfu == pytest.approx(500 / elapsed * 50 / 1e6)
    assert clock.read().tokens_per_second == 0


def test_peak_of_a_cpu_is_measured() -> None:
    flops = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < flops < 1e14
    assert peak_flops(torch.device("cpu"), torch.float32) == flops
