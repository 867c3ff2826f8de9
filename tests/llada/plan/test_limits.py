"""A thousand nodes: what our machinery sees there, and the constants against the code and the results they are from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llada.config import Recipe
from llada.data.report.cost import Cluster
from llada.data.work.units import UNITS_PER_GROUP
from llada.plan import limits
from llada.plan.checkpoints import plan_checkpoints
from llada.plan.limits import Demand, Drivers, first_to_break, prepare_demands, train_demands
from llada.plan.training import estimate_training
from llada.presets import get_preset
from llada.training.checkpoint.tensors import _UPLOADS
from llada.training.events import StepDone, event_to_json

RESULTS = Path(__file__).parents[3] / "tests/benchmarks/results"
DRIVERS = Drivers(4096, 10.0, 500, 100_000, 2.0)


def of_training(recipe: Recipe, gpus: int) -> dict[str, Demand]:
    cost = estimate_training(recipe, gpus=gpus, gpu="h100", mfu=0.35)
    steps = cost.tokens // recipe.pretrain.train.global_batch_tokens
    plan = plan_checkpoints(recipe, gpus=gpus, gpus_per_node=8, num_steps=steps)
    interval = recipe.pretrain.train.checkpoint_every * cost.days * 86_400 / steps
    demands = train_demands(
        recipe, cost, plan, DRIVERS, unique_tokens=2.3e12, gpus_per_node=8, interval_s=interval
    )
    return {demand.what: demand for demand in demands}


def changed(recipe: Recipe, **train: object) -> Recipe:
    run = recipe.pretrain
    return replace(recipe, pretrain=replace(run, train=replace(run.train, **train)))


def test_eight_nodes_break_nothing() -> None:
    assert first_to_break(list(of_training(get_preset("llada_8b"), 64).values())) == []
    small = prepare_demands(1e11, Cluster(nodes=8), DRIVERS)
    assert "cores for Ray Data's blocks" not in [demand.what for demand in first_to_break(small)]


def test_a_thousand_nodes_of_training_and_the_remedies() -> None:
    """8,000 workers for 1,280 rows; each reads one row a step in three requests."""
    recipe = get_preset("llada_8b")
    found = of_training(recipe, 8000)
    assert found["workers for the rows of a batch"].share == pytest.approx(8000 / 1280)
    cost = estimate_training(recipe, gpus=8000, gpu="h100", mfu=0.35)
    step_s = 1280 * 4096 / (cost.tokens_per_second_per_gpu * 8000)
    assert found["reads of rows from the store"].amount == pytest.approx(3 * 8000 / step_s)
    plan = found["worker 0's plan of a checkpoint, beside its steps"]
    assert plan.amount == pytest.approx(3 * 291 * 8000 * (20e-6 + 26e-6))
    broken = {demand.what for demand in first_to_break(list(found.values()))}
    assert broken == {
        "workers for the rows of a batch",
        "reads of rows from the store",
        "worker 0's plan of a checkpoint, beside its steps",
    }
    # As the remedies say; the store's requests stay, until the shards are on the nodes' disks.
    mended = changed(recipe, global_batch_tokens=8000 * 4096, shard_workers=8, checkpoint_every=3000)
    assert {demand.what for demand in first_to_break(list(of_training(mended, 8000).values()))} == {
        "reads of rows from the store"
    }


def test_a_thousand_nodes_of_preparation() -> None:
    demands = {demand.what: demand for demand in prepare_demands(15e12, Cluster(nodes=1000), DRIVERS)}
    blocks = demands["cores for Ray Data's blocks"]
    assert blocks.share == pytest.approx(64_000 / 4096)
    assert "16 parts" in blocks.remedy
    assert demands["tasks that run at a time"].amount == 4096
    assert demands["finished tasks at the driver"].share < 0.1
    units = demands["tasks of a step"].amount  # 15 T tokens · 4.2 bytes / 0.58 · 0.4 in units of 64 MiB
    assert units == pytest.approx(15e12 * 4.2 / 0.58 * 0.4 / 2**26)
    assert demands["memory of the driver"].amount == pytest.approx(190 * 2**20 + 16 * units)


def test_the_highest_share_comes_first() -> None:
    some = [Demand("a", name, amount, "x", limit) for name, amount, limit in
            [("fits", 1, 2), ("breaks", 3, 2), ("breaks more", 5, 2), ("free", 9, None)]]  # fmt: skip
    assert [demand.what for demand in first_to_break(some)] == ["breaks more", "breaks"]


def test_the_constants_are_those_of_the_code_and_the_results() -> None:
    assert limits._FILES_PER_WORKER == _UPLOADS
    assert limits._UNITS_PER_GROUP == UNITS_PER_GROUP
    recipe = get_preset("llada_8b")
    assert recipe.prepare.unit_bytes == limits._UNIT_BYTES
    driver = json.loads((RESULTS / "prepare_scale.json").read_text())["driver"]["measured"][-1]
    assert driver["units"] / driver["seconds"] == pytest.approx(limits.DRIVER_TASKS_PER_S, rel=0.001)
    assert driver["driver_mib"] * 2**20 == pytest.approx(limits.DRIVER_BYTES, rel=0.01)
    line = event_to_json(
        StepDone(123456, 2.345678901234567, 1.234e-4, 0.123456789, 10**12, 1.23e6, 0.345678901, 4900.123456,
                 0.0123456789, 61.23456, 70.12345, 3, (2.345678901234,) * 10, (123_456,) * 10)
    )  # fmt: skip
    assert limits._LINE_BYTES / 2 < len(json.dumps(line)) < limits._LINE_BYTES
