"""The planner against LLaDA's published bill."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llada.errors import UserError
from llada.plan.published import mfu_range
from llada.plan.table import training_rows
from llada.plan.training import TrainingCost, estimate_training
from llada.presets import get_preset


def text(cost: TrainingCost) -> str:
    return "\n".join(line for _, line in training_rows(cost))


def test_llada_8b_costs_what_was_published():
    """0.13 M H800 hours for 2.3 T tokens is about 4,900 tokens/s per GPU, 24 % of 989 TFLOP/s by 6·N (attention apart)."""
    # Attention adds 9 % to 6·N. Of how many GPUs is not told; 64 share out 1280 rows without a filler.
    estimate = estimate_training(get_preset("llada_8b"), gpus=64, gpu="h800", mfu=0.26)
    assert estimate.days * 24 * 64 == pytest.approx(0.13e6, rel=0.05)
    assert estimate.tokens_per_second_per_gpu == pytest.approx(4900, rel=0.05)
    assert estimate.fits


def test_rows_that_only_fill_up_cost_time() -> None:
    """96 GPUs: 14 rows each in 4 micro-batches of 4 and 3, 1344 for 1280."""
    even, odd = (
        estimate_training(get_preset("llada_8b"), gpus=gpus, gpu="h800", mfu=0.26) for gpus in (64, 96)
    )
    assert (even.micro_batches, even.micro_rows, even.filler) == (5, 4, 0)
    assert (odd.micro_batches, odd.micro_rows) == (4, 4)
    assert odd.filler == pytest.approx(1 - 1280 / 1344)
    assert odd.days * 96 == pytest.approx(even.days * 64 / (1 - odd.filler))
    assert "4.8% of all rows only fill up" in text(odd)
    assert "fill up" not in text(even)


def test_one_gpu_cannot_train_8b_and_the_text_says_so():
    estimate = estimate_training(get_preset("llada_8b"), gpus=1, gpu="h100", mfu=0.35)
    assert not estimate.fits
    assert "does not fit; what lowers it most: workers 1 → 2" in text(estimate)


def test_unknown_gpu():
    with pytest.raises(UserError, match="no accelerator 'tpu'.*h100"):
        estimate_training(get_preset("llada_8b"), gpus=8, gpu="tpu", mfu=0.3)


def test_a_recipe_that_counts_epochs_says_which_setting_is_missing():
    recipe = get_preset("llada_8b")
    train = replace(recipe.pretrain.train, num_steps=None)
    counting = replace(recipe, pretrain=replace(recipe.pretrain, train=train))
    with pytest.raises(UserError, match=r"set pretrain\.train\.num_steps"):
        estimate_training(counting, gpus=8, gpu="h100", mfu=0.3)


def test_the_range_is_that_of_the_published_runs_and_holds_what_was_asked_for():
    low, high = mfu_range()
    cost = estimate_training(get_preset("llada_8b"), gpus=64, gpu="h800", mfu=0.35)
    assert cost.days_range == pytest.approx((cost.days * 0.35 / high, cost.days * 0.35 / low))
    fast = estimate_training(get_preset("llada_8b"), gpus=64, gpu="h800", mfu=0.6)
    assert fast.days_range == pytest.approx((fast.days, fast.days * 0.6 / low))


def test_float8_is_faster():
    recipe = get_preset("llada_8b")
    train = replace(recipe.pretrain.train, float8=True)
    fast = replace(recipe, pretrain=replace(recipe.pretrain, train=train))
    plain, float8 = (estimate_training(each, gpus=64, gpu="h100", mfu=0.35) for each in (recipe, fast))
    assert plain.days == pytest.approx(1.28 * float8.days)
