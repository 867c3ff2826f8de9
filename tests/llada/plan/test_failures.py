"""Goodput: the formula against runs that fail at random, Daly's interval against the best of all intervals."""

from __future__ import annotations

import random

import pytest

from llada.errors import UserError
from llada.plan.failures import MTBF_GPU_HOURS, Failures, duration


def simulate(failures: Failures, interval: float, seed: int, crashes: int) -> float:
    """Walk through so many failures, second by event: work, stand still, write beside the next work."""
    draw = random.Random(seed)
    clock = kept = 0.0
    for _ in range(crashes):
        end = clock + draw.expovariate(1 / failures.mtbf)
        now, done = clock, 0.0  # of this attempt
        while True:
            now += interval + failures.stall  # steps, then the copy of them
            if now + failures.write > end:
                break
            done += interval
        kept += done
        clock = end
        while (spared := draw.expovariate(1 / failures.mtbf)) < failures.restart:
            clock += spared  # it fails again before it goes on
        clock += failures.restart
    return kept / clock


@pytest.mark.parametrize(
    ("failures", "interval"),
    [
        (Failures(mtbf=10_000, stall=0, write=0, restart=0), 500),
        (Failures(mtbf=10_000, stall=60, write=0, restart=600), 1000),
        (Failures(mtbf=10_000, stall=1, write=400, restart=600), 900),
        (Failures(mtbf=2_000, stall=100, write=700, restart=1500), 700),
    ],
)
def test_the_formula_is_what_happens(failures: Failures, interval: float) -> None:
    found = [simulate(failures, interval, seed, 4000) for seed in range(8)]
    mean = sum(found) / len(found)
    assert failures.goodput(interval) == pytest.approx(mean, rel=0.01)


def test_by_hand() -> None:
    """Nothing but failures, and a checkpoint at every half of the time between them: 1/2 / (√e − 1)."""
    assert Failures(mtbf=100, stall=0, write=0, restart=0).goodput(50) == pytest.approx(
        0.5 / (2.718281828**0.5 - 1)
    )


@pytest.mark.parametrize("stall", [0.05, 5, 60, 600])
def test_dalys_interval_is_nearly_the_best(stall: float) -> None:
    failures = Failures(mtbf=20_000, stall=stall, write=0, restart=600)
    best = max(failures.goodput(seconds) for seconds in (10 * 1.02**n for n in range(450)))
    assert failures.goodput(failures.best_interval) == pytest.approx(best, rel=1e-3)
    assert failures.young == pytest.approx((2 * stall * 20_000) ** 0.5)
    assert failures.daly < failures.young


def test_no_interval_is_shorter_than_a_write() -> None:
    failures = Failures(mtbf=20_000, stall=0.1, write=1000, restart=600)
    assert failures.best_interval == 1000
    assert failures.goodput(10) == failures.goodput(1000)


def test_the_longest_interval_loses_what_it_may() -> None:
    failures = Failures(mtbf=20_000, stall=1, write=60, restart=600)
    longest = failures.longest_interval(0.01)
    assert longest > failures.best_interval
    assert failures.goodput(longest) == pytest.approx(
        failures.goodput(failures.best_interval) - 0.01, abs=1e-6
    )


def test_llama_3_had_more_than_90_percent() -> None:
    """16,384 GPUs, an interruption every three hours: "higher than 90 % effective training time" (§3.3.4)."""
    failures = Failures(mtbf=MTBF_GPU_HOURS / 16_384 * 3600, stall=5, write=60, restart=600)
    assert 0.9 < failures.goodput(failures.best_interval) < 0.95


def test_a_checkpoint_that_takes_longer_than_the_cluster_holds_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"fails every 10\.0 min, and a checkpoint takes 15\.0 min.*fewer GPUs"
    ):
        Failures(mtbf=600, stall=100, write=800, restart=60)
    with pytest.raises(UserError, match=r"fails every 10\.0 min, and a restart takes 15\.0 min.*--restart-s"):
        Failures(mtbf=600, stall=1, write=1, restart=900)


def test_durations() -> None:
    assert [duration(s) for s in (0.04, 30, 90, 7200, 2e5)] == [
        "0.04 s",
        "30 s",
        "1.5 min",
        "2.0 hours",
        "2.3 days",
    ]
