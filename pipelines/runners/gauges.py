"""What Prometheus sees of a stage: numbers on the metrics port of the driver's node, beside Ray's own, as `ray_llada_…`.

MLflow keeps a run's history; these are for dashboards and alerts (infra/monitoring). What cannot be shown is worked on all the
same: nothing here raises or waits.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from functools import cached_property
from typing import Any

from llada.training.events import CheckpointFailed, RunStarted, StepDone, StepSkipped, Validated
from llada.training.watch import Hang

TRAINING = {
    "steps": "Steps of the run",
    "workers": "Training workers",
    "step": "Steps done",
    "seen_timestamp_seconds": "When the last logged step was done",
    "loss_nats_per_token": "Training loss of the last log interval",
    "learning_rate": "Learning rate",
    "grad_norm": "Global norm of the gradient before clipping",
    "tokens": "Tokens trained on",
    "tokens_per_second": "Of all workers",
    "mfu": "Model FLOPs utilisation, 0 to 1",
    "data_wait": "Share of the time in which worker 0 waited for a batch, 0 to 1",
    "allocated_gib": "The most that tensors took on worker 0's device",
    "skipped_steps": "Steps whose loss or gradient was not finite",
    "validation_nats_per_token": "Validation bound",
    "validation_ratio": "Validation bound over the unigram cross-entropy",
    "failed_checkpoints": "Checkpoints that could not be written, since the driver began",
    "hangs": "Steps that did not end, since the driver began",
}
TASKS = {"tasks": "Tasks of a step of preparation", "tasks_done": "Tasks of it that are done"}


# Ray forgets a number that it has not been told for two of its report intervals, of 10 s each unless it is set otherwise.
RETOLD_EVERY_S = 1.5


class _Gauges:
    """Numbers by name and label, told again and again until it is gone: Ray by itself would forget the last ones."""

    def __init__(self, stage: str, descriptions: dict[str, str], tag: str) -> None:
        self._stage, self._descriptions, self._tag = stage, descriptions, tag
        self._values: dict[tuple[str, str], float] = {}
        self._thread: threading.Thread | None = None

    @cached_property
    def _gauges(self) -> dict[str, Any]:
        from ray.util.metrics import Gauge

        return {
            name: Gauge(f"llada_{self._stage}_{name}", description, tag_keys=(self._tag,))
            for name, description in self._descriptions.items()
        }

    def set(self, label: str, values: dict[str, float]) -> None:
        self._values.update({(name, label): value for name, value in values.items()})
        self.tell()
        if self._thread is None:
            self._thread = threading.Thread(
                target=_retell, args=(weakref.ref(self),), name="gauges", daemon=True
            )
            self._thread.start()

    def tell(self) -> None:
        with contextlib.suppress(Exception):
            for (name, label), value in list(self._values.items()):
                self._gauges[name].set(value, {self._tag: label})


def _retell(gauges: weakref.ref[_Gauges]) -> None:
    while (there := gauges()) is not None:
        there.tell()
        del there
        time.sleep(RETOLD_EVERY_S)


class TrainingGauges:
    """Of a training, told by its events. One at a time in a process."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._hangs = self._failed = 0
        self._gauges = _Gauges("train", TRAINING, "stage")

    def show(self, event: object) -> None:
        """Take in what is new with an event of the training, or a hang."""
        values: dict[str, float] = {}
        match event:
            case RunStarted():
                values = {"steps": event.num_steps, "step": event.first_step, "workers": event.workers}
                values |= {"seen_timestamp_seconds": time.time(), "failed_checkpoints": 0, "hangs": 0}
            case StepDone():
                values = {
                    "step": event.step,
                    "seen_timestamp_seconds": time.time(),
                    "loss_nats_per_token": event.loss,
                    "learning_rate": event.lr,
                    "grad_norm": event.grad_norm,
                    "tokens": event.tokens,
                    "tokens_per_second": event.tokens_per_second,
                    "mfu": event.mfu,
                    "data_wait": event.data_wait,
                    "allocated_gib": event.allocated_gib,
                    "skipped_steps": event.skipped_steps,
                }
            case StepSkipped():
                values = {"seen_timestamp_seconds": time.time()}
            case Validated():
                values = {"validation_nats_per_token": event.loss, "validation_ratio": event.ratio}
            case CheckpointFailed():
                self._failed += 1
            case Hang():
                self._hangs += 1
        if self._failed or self._hangs:
            values |= {"failed_checkpoints": self._failed, "hangs": self._hangs}
        if values:
            self._gauges.set(self.stage, values)


class TaskGauges:
    """Of the steps of a preparation."""

    def __init__(self) -> None:
        self._gauges = _Gauges("prepare", TASKS, "step")

    def show(self, step: str, tasks: int, done: int) -> None:
        """So many tasks of a step are done."""
        self._gauges.set(step, {"tasks": tasks, "tasks_done": done})
