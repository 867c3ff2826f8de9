"""Replicas: forwards by hand, and what makes them fewer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llada.errors import UserError
from llada.hardware import ACCELERATORS
from llada.plan.serving import LOAD, MFU, ServingPlan, plan_serving
from llada.presets import get_preset


def plan(**sampling: object) -> ServingPlan:
    recipe = get_preset("llada_8b")
    recipe = replace(recipe, sampling=replace(recipe.sampling, **sampling))
    return plan_serving(recipe, gpu="H100", requests_per_second=20, prompt_tokens=256)


def test_by_hand() -> None:
    """128 forwards over 256 + 128 tokens, each a third of a training step's FLOPs."""
    found = plan()
    assert (found.forwards, found.token_forwards) == (128, 128 * 384)
    flops = 128 * 384 * get_preset("llada_8b").model.training_flops_per_token(384) / 3
    seconds = [flops / ACCELERATORS["h100"].bf16_flops / mfu for mfu in reversed(MFU)]
    assert found.gpu_seconds == pytest.approx(seconds)
    assert found.replicas == tuple(math.ceil(20 * each / LOAD) for each in seconds)
    assert found.fits


def test_fewer_forwards_and_caches_need_fewer_replicas() -> None:
    assert plan(steps=64).replicas[1] == pytest.approx(plan().replicas[1] / 2, abs=1)
    dual, prefix = plan(cache="dual"), plan(cache="prefix")
    assert dual.token_forwards == 4 * 384 + (128 - 4) * 32
    assert dual.token_forwards < prefix.token_forwards < plan().token_forwards
    assert plan(cfg_scale=1.0).gpu_seconds[0] == pytest.approx(2 * plan().gpu_seconds[0])


def test_weights_that_are_read_for_a_block_are_a_bound() -> None:
    """8 requests share a forward: 128 readings of 16 GB at 3.35 TB/s, over 8."""
    found = plan(cache="dual")
    assert found.gpu_seconds[0] >= 128 * found.weights_bytes / 3.35e12 / 8 * (1 - 1e-9)


@pytest.mark.parametrize(("cache", "tokens_per_second"), [(None, 6.7), ("prefix", 21.2)])
def test_fast_dllms_table_lies_within_the_range(cache: str | None, tokens_per_second: float) -> None:
    """LLaDA-8B on one A100, GSM8K with five examples (about a thousand tokens), 256 tokens in blocks of 32, one request at a time
    (arXiv 2505.22618, Table 1)."""
    recipe = get_preset("llada_8b")
    sampling = replace(recipe.sampling, gen_length=256, steps=256, block_length=32, cache=cache)
    found = plan_serving(
        replace(recipe, sampling=sampling),
        gpu="a100",
        requests_per_second=1,
        prompt_tokens=1000,
        concurrency=1,
    )
    assert 256 / found.gpu_seconds[1] < tokens_per_second < 256 / found.gpu_seconds[0]


def test_an_unknown_gpu_and_one_that_is_too_small() -> None:
    recipe = get_preset("llada_8b")
    with pytest.raises(UserError, match="no accelerator"):
        plan_serving(recipe, gpu="h10", requests_per_second=1, prompt_tokens=1)
    large = replace(recipe, model=replace(recipe.model, num_layers=160))
    assert not plan_serving(large, gpu="l40s", requests_per_second=1, prompt_tokens=1).fits
