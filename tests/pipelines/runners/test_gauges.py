"""What Prometheus is told of a training and of a preparation, as a Ray that runs says it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from llada.training.events import CheckpointFailed, RolledBack, RunStarted, StepDone, Validated
from llada.training.watch import Hang
from pipelines.runners.gauges import TASKS, TRAINING, TaskGauges, TrainingGauges

pytestmark = pytest.mark.integration


def test_each_number_arrives(local_ray, scrape: Callable[..., dict[str, float]]):
    began = time.time()
    training = TrainingGauges("pretrain")
    training.show(RunStarted(2, 8, 1000, 5.25, "float32", 4))
    training.show(StepDone(4, 6.5, 0.0008, 1.5, 8192, 13734.5, 0.25, data_wait=0.125, allocated_gib=2.5))
    training.show(Validated(4, 6.0, 1.125))
    training.show(CheckpointFailed(4, "the store is away"))
    training.show(Hang("step", 90.0, 3.0, "stacks"))
    training.show(RolledBack(2, 4, 0.5))  # says nothing here
    tasks = TaskGauges()
    tasks.show("encode", 10, 7)
    time.sleep(10)  # Ray forgets after 4 s, as these tests have set it

    names = [f"ray_llada_prepare_{name}" for name in TASKS]
    said = scrape(*names, step="encode")
    assert [said[name] for name in names] == [10, 7]
    said = scrape(*(f"ray_llada_train_{name}" for name in TRAINING), stage="pretrain")
    values = {name: said[f"ray_llada_train_{name}"] for name in TRAINING}
    assert began - 1 <= values.pop("seen_timestamp_seconds") <= time.time()
    assert values == {
        "steps": 8,
        "workers": 4,
        "step": 4,
        "loss_nats_per_token": 6.5,
        "learning_rate": 0.0008,
        "grad_norm": 1.5,
        "tokens": 8192,
        "tokens_per_second": 13734.5,
        "mfu": 0.25,
        "data_wait": 0.125,
        "allocated_gib": 2.5,
        "skipped_steps": 0,
        "validation_nats_per_token": 6.0,
        "validation_ratio": 1.125,
        "failed_checkpoints": 1,
        "hangs": 1,
    }
