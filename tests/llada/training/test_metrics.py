"""Throughput readings."""

import time

import pytest
import torch

from llada.training.metrics import Throughput, add_up, mean_by_noise, peak_flops, peak_memory


def test_throughput_counts_since_the_last_reading() -> None:
    clock = Throughput(flops_per_token=50.0, peak=2.5e5, num_workers=4)
    for _ in range(2):
        clock.add(300)
        clock.add(200)
        start = clock.since
        time.sleep(0.02)
        reading = clock.read(0.01)
        elapsed = clock.since - start
        assert elapsed >= 0.02
        assert reading.tokens_per_second == pytest.approx(500 / elapsed)
        assert reading.tokens_per_second_per_worker == pytest.approx(125 / elapsed)
        assert reading.mfu == pytest.approx(500 / elapsed * 50 / 1e6)
        assert reading.data_wait == pytest.approx(0.01 / elapsed)
    assert clock.read(0.0).tokens_per_second == 0


def test_the_memory_of_a_cpu_is_its_processs() -> None:
    before = peak_memory(torch.device("cpu"))
    ballast = torch.ones(int((before.allocated_gib + 0.1) * 2**28))  # float32: more than all so far
    after = peak_memory(torch.device("cpu"))
    assert after.allocated_gib >= ballast.nbytes / 2**30
    assert after == (after.reserved_gib, after.reserved_gib)


def test_the_loss_by_noise_is_the_mean_over_an_intervals_tokens() -> None:
    sums = add_up(add_up((), [6.0, 2.0, 0.0, 0.0]), [1.5, 1.0, 4.0, 1.0])
    assert sums == (7.5, 3.0, 4.0, 1.0)
    assert mean_by_noise(sums) == ((2.5, 4.0), (3, 1))
    assert mean_by_noise([6.0, 2.0, 0.0, 0.0]) == ((3.0, 0.0), (2, 0))
    assert mean_by_noise(()) == mean_by_noise([0.0] * 4) == ((), ())


def test_peak_of_a_cpu_is_measured() -> None:
    flops = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < flops < 1e14
    assert peak_flops(torch.device("cpu"), torch.float32) == flops
