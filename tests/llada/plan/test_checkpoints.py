"""Checkpoints by hand, and against the tensors of a real network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llada.model.transformer import Transformer
from llada.plan import checkpoints
from llada.plan.checkpoints import plan_checkpoints
from llada.presets import get_preset
from llada.training.memory import checkpoint_bytes

RESULTS = Path(__file__).parents[3] / "tests/benchmarks/results"


def test_by_hand() -> None:
    """LLaDA-8B: weights and two moments in float32, 96 GB; 8 nodes at 1 and 2 GB/s; read twice, once for its checksums."""
    recipe = get_preset("llada_8b")
    plan = plan_checkpoints(recipe, gpus=64, gpus_per_node=8, num_steps=438_690, rates=(1e9, 2e9))
    size = 12 * recipe.model.num_parameters
    assert plan.bytes == size == checkpoint_bytes(recipe.model, recipe.pretrain)
    assert plan.stall == pytest.approx(size / 64 / checkpoints.COPY_RATE)
    assert plan.shards == 3 * (9 * 32 + 3) * 64
    assert plan.plan == pytest.approx(plan.shards * (20e-6 + 26e-6))
    assert plan.write == pytest.approx((plan.plan + size / 16e9, plan.plan + size / 8e9))
    assert plan.read == pytest.approx((2 * size / 16e9, 2 * size / 8e9))
    assert plan.kept == 2


def test_groups_of_workers_read_the_whole_each_and_plan_less() -> None:
    recipe = get_preset("llada_8b")
    train = replace(recipe.pretrain.train, shard_workers=8, keep_every=100_000)
    grouped = replace(recipe, pretrain=replace(recipe.pretrain, train=train))
    plan, plain = (
        plan_checkpoints(each, gpus=64, gpus_per_node=8, num_steps=438_690) for each in (grouped, recipe)
    )
    assert plan.shards * 8 == plain.shards
    assert plan.plan == pytest.approx(plain.shards * (20e-6 + 26e-6 / 8))
    assert plan.stall == pytest.approx(8 * plain.stall)
    assert plan.read[0] == pytest.approx(plain.read[0] * 9 / 2)
    assert plan.kept == 2 + 4


def test_the_shards_are_those_of_the_network() -> None:
    recipe = get_preset("tiny")
    with torch.device("meta"):
        tensors = len(list(Transformer(recipe.model).parameters()))
    adamw = replace(recipe.pretrain, optim=replace(recipe.pretrain.optim, optimizer="adamw"))
    plan = plan_checkpoints(replace(recipe, pretrain=adamw), gpus=1, gpus_per_node=8, num_steps=1000)
    assert plan.shards == 3 * tensors


def test_the_figures_are_the_measured_ones() -> None:
    measured = json.loads((RESULTS / "checkpoint_metadata.json").read_text())["measured"]
    copies, whole = (
        next(found for found in measured if (found["workers"], found["workers_of_a_copy"]) == (4096, size))
        for size in (8, 4096)
    )
    assert copies["worker_0_us_per_shard"] == pytest.approx(checkpoints.SENT_S * 1e6, rel=0.03)
    both = (checkpoints.SENT_S + checkpoints.SHARD_S) * 1e6
    assert whole["worker_0_us_per_shard"] == pytest.approx(both, rel=0.03)
    assert whole["metadata_bytes_per_shard"] == pytest.approx(checkpoints.METADATA_BYTES, rel=0.01)
    assert copies["worker_0_bytes_per_shard"] == pytest.approx(checkpoints.SENT_BYTES, rel=0.03)
    both = checkpoints.SENT_BYTES + checkpoints.SHARD_BYTES
    assert whole["worker_0_bytes_per_shard"] == pytest.approx(both, rel=0.03)
