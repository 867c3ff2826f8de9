"""What the workers of a training say, on its way to the terminal and to MLflow.

A worker tells (`Reporter`), a thread of the driver listens (`Listener`), and a channel (channel.py) stands between them.
Neither waits for the other, and what cannot be told or shown is trained all the same: the record (stage/metrics.py) has it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from llada.training.events import (
    CheckpointFailed,
    CheckpointSkipped,
    Event,
    RolledBack,
    RunStarted,
    Sampled,
    StepDone,
    StepSkipped,
    Validated,
)
from llada.training.watch import Hang
from pipelines.runners.channel import Channel
from pipelines.runners.gauges import TrainingGauges
from pipelines.runners.worker_error import WorkerError
from pipelines.stage.metrics import points_of, step_of
from pipelines.stage.tracking import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HungWorker:
    """A worker that ends itself, because a step of it does not end."""

    rank: int
    hang: Hang


Said = Event | WorkerError | HungWorker


class Reporter:
    """Tells the driver of a worker's events. It never waits for the driver, and never fails because of it."""

    def __init__(self, events: Channel) -> None:
        self.events = events

    def tell(self, item: Said) -> None:
        with contextlib.suppress(Exception):
            self.events.put(item)

    def flush(self) -> None:
        """Wait a little for what was told last."""
        with contextlib.suppress(Exception):
            self.events.flush()


class Listener:
    """Hears what comes through the channel while the trainer runs, and removes it."""

    def __init__(
        self, events: Channel, tracker: Tracker | None, label: str, *, progress: bool, log_folder: str
    ) -> None:
        self.events, self.tracker, self.label, self.progress = events, tracker, label, progress
        self.hangs = os.path.join(log_folder, "hangs.log")
        self.gauges = TrainingGauges(label)
        self._has_started = self._has_failed = self._goes_back = False
        self._bar: tqdm | None = None
        self._latest: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._drain, daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(Exception):  # Ray itself may be gone, and the queue with it
            self.events.close()
        self._thread.join()
        with contextlib.suppress(Exception):
            self.events.remove()
        if self._bar is not None:
            self._bar.close()

    def _drain(self) -> None:
        from ray.exceptions import RayError

        failed: set[str] = set()
        with contextlib.suppress(RayError, OSError):
            while (event := self.events.get()) is not None:
                try:
                    self._handle(event)
                except Exception as error:  # what cannot be shown is trained all the same
                    if repr(error) not in failed:
                        log.exception("%s: cannot show %s", self.label, type(event).__name__)
                    failed.add(repr(error))

    def _handle(self, event: Said) -> None:
        self._track(event)
        self.gauges.show(event.hang if isinstance(event, HungWorker) else event)
        match event:
            case WorkerError():
                # The first of an attempt: the other workers fail because this one has.
                if not self._has_failed:
                    log.warning("%s: worker %d: %s", self.label, event.rank, event.message)
                self._has_failed = True
            case HungWorker():
                self._keep_stacks(event)
            case RunStarted():
                if self._has_started and not self._goes_back:
                    log.warning(
                        "%s: the workers have started again, behind step %d", self.label, event.first_step
                    )
                self._has_started, self._has_failed, self._goes_back = True, False, False
                self._start(event)
            case CheckpointSkipped():
                log.warning("%s: %s: going on from an older one", self.label, event.reason)
            case CheckpointFailed():
                log.warning("%s: %s; training goes on", self.label, event.reason)
            case StepSkipped():
                log.warning(
                    "%s: step %d is skipped: its loss (%s) or gradient (%s) is not finite",
                    self.label,
                    event.step,
                    event.loss,
                    event.grad_norm,
                )
            case RolledBack():
                self._goes_back = True
                log.warning(
                    "%s: after step %d back to the checkpoint of step %d, with the learning rates times %g",
                    self.label,
                    event.diverged_at,
                    event.step,
                    event.lr_scale,
                )
            case StepDone() | Validated():
                self._show(event)
            case Sampled() if self._bar is not None and self.progress:
                self._bar.write(
                    f"{self.label}: step {event.step:,} writes “{' '.join(event.texts[0].split())}”"
                )

    def _keep_stacks(self, event: HungWorker) -> None:
        hang = event.hang
        if not self._has_failed:
            log.error(
                "%s: a %s has not ended for %.0f s, and usually takes %.1f s: the workers are started again; what each of "
                "them was at is in %s",
                self.label,
                hang.phase,
                hang.seconds,
                hang.usual_seconds,
                self.hangs,
            )
        self._has_failed = True
        with open(self.hangs, "a", encoding="utf-8") as file:
            file.write(
                f"{time.ctime()}: worker {event.rank}, {hang.phase} for {hang.seconds:.0f} s\n{hang.stacks}\n"
            )

    def _start(self, event: RunStarted) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = tqdm(
            total=event.num_steps,
            initial=event.first_step,
            desc=self.label,
            unit="step",
            disable=not self.progress,
            leave=False,
        )

    def _show(self, event: StepDone | Validated) -> None:
        if self._bar is not None:
            self._bar.update(event.step - self._bar.n)
            self._latest[type(event).__name__] = event
            self._bar.set_postfix_str(
                progress_text(self._latest.get("StepDone"), self._latest.get("Validated"))
            )

    def _track(self, event: Said) -> None:
        if self.tracker is None:
            return
        match event:
            case RunStarted():
                facts = asdict(event)
                first_step, workers = facts.pop("first_step"), facts.pop("workers")
                self.tracker.log_params({f"run.{name}": value for name, value in facts.items()})
                self.tracker.log_metrics({"run.workers": workers}, step=first_step)
            case RolledBack():
                self.tracker.redo_metrics(after=event.step)
                self.tracker.log_metrics(points_of(event), step=step_of(event))
            case Sampled():
                text = "\n\n".join(event.texts)
                self.tracker.log_text(f"samples/step-{event.step:08d}.txt", text)
            case StepDone() | StepSkipped() | Validated():
                self.tracker.log_metrics(points_of(event), step=step_of(event))


def progress_text(step: StepDone | None, validated: Validated | None) -> str:
    """What stands behind the bar, from what was told last."""
    losses = [
        *([f"loss {step.loss:.3f}"] if step else []),
        *([f"bound {validated.loss:.3f}"] if validated else []),
    ]
    speed = [f"{step.tokens_per_second:,.0f} tokens/s", f"MFU {step.mfu:.0%}"] if step else []
    return ", ".join([", ".join(losses) + " nats/token", *speed])
