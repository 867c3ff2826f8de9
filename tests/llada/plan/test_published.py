"""The count of FLOPs against what others say of their own runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llada.hardware import ACCELERATORS
from llada.plan.published import PUBLISHED, mfu_range


def test_torchtitan_counts_the_same_but_for_the_causal_half() -> None:
    """It calls the two ends of its table 33 % and 39 %, of attention without a mask."""
    runs = [run for run in PUBLISHED if "torchtitan" in run.source and not run.float8]
    assert len(runs) == 4
    whole = [
        replace(run.model, causal=False).training_flops_per_token(run.row_length)
        * run.tokens_per_second
        / ACCELERATORS[run.gpu].bf16_flops
        for run in runs
    ]
    assert min(whole) == pytest.approx(0.33, abs=0.01)
    assert max(whole) == pytest.approx(0.39, abs=0.01)
    assert runs[0].model.num_parameters == pytest.approx(8.03e9, rel=1e-3)


def test_float8_is_as_much_faster_on_128_gpus_as_on_8() -> None:
    of_8, of_128 = (run for run in PUBLISHED if run.float8)
    plain_8, plain_128 = (run for run in PUBLISHED if "and compile" in run.name)
    assert of_8.mfu == pytest.approx(plain_8.mfu, rel=0.005)
    assert of_128.mfu == pytest.approx(plain_128.mfu, rel=0.01)


def test_llada_8b_as_published() -> None:
    """2.3e12 tokens in 0.13e6 hours are 4,915 a second; 6 N is 22 to 24 % of 989 TFLOP/s, attention adds the rest."""
    llada = PUBLISHED[0]
    assert llada.tokens_per_second == pytest.approx(4915, abs=1)
    assert 0.24 < llada.mfu < 0.27


def test_the_error_of_planning() -> None:
    """A run at half the utilisation that was planned needs twice the hours: half of them were planned."""
    run = PUBLISHED[0]
    assert run.error(2 * run.mfu) == pytest.approx(-0.5)
    low, high = mfu_range()
    assert all(run.error(low) >= 0 >= run.error(high) for run in PUBLISHED)
    assert (low, high) == (min(run.mfu for run in PUBLISHED), max(run.mfu for run in PUBLISHED))
    assert max(abs(run.error(0.35)) for run in PUBLISHED) < 0.3  # what README says of it
