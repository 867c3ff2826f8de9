"""A training function on N Ray Train workers: what `pretrain` and `sft` do their work with.

Ray starts the workers, joins them in a process group and starts them again after a crash; the loop itself is
llada.training.trainer.train, which finds its own newest checkpoint. Ray's dataset iterator and checkpoint store are not
used: the iterator forgets its position at a restart (Ray 2.60), ours is arithmetic.

What worker 0 reports goes into metrics.jsonl, in step with the checkpoints, and to the driver, which shows the progress and
talks to MLflow. A UserError of any worker ends the run; every other exception is tried again, and the last one reaches
the terminal with its remote traceback.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llada.errors import UserError
from llada.files import join, local_path, storage_errors
from llada.training.events import (
    CheckpointDue,
    CheckpointSkipped,
    Event,
    EventSink,
    RolledBack,
    RunStarted,
    StepDone,
    StepSkipped,
    Validated,
)
from llada.training.trainer import TrainResult
from pipelines.stage.cluster import ClusterConfig, connect, is_own_ray, require_room
from pipelines.stage.tracking import Tracker
from pipelines.stage.training import MetricsFile

# Worker crashes survived in one run.
MAX_FAILURES = 3
# A GPU node may have to be started first; Ray's own limit is 60 s.
WORKER_START_TIMEOUT_S = "1800"
# How long a worker that is done waits for the driver to hear of it.
FLUSH_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)

TrainFunction = Callable[[EventSink], TrainResult]
"""What every worker runs, inside its process group. Picklable; it may be run again, and then goes on."""


@dataclass(frozen=True)
class _Crash:
    """An exception on a worker that Ray may try again."""

    rank: int
    traceback: str


def run_workers(
    function: TrainFunction,
    *,
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None,
    label: str,
    progress: bool,
) -> TrainResult:
    """What `function` returned on worker 0, without the weights: it has to leave those in the folder `output`.

    Raises UserError for what the user can mend, and Ray's own exception with the worker's traceback for everything else
    that has happened MAX_FAILURES + 1 times.
    """
    with storage_errors(output), connect(cluster, _log_folder(output)):
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        require_room("num_workers", cluster.num_workers, cluster.cpus_per_worker, cluster.gpus_per_worker)
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", WORKER_START_TIMEOUT_S)
        # On the driver's node: what is lost with any other node must be replaceable.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        events, user_errors = (
            Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}) for _ in range(2)
        )
        # Any: Ray's own types are those of its first version, where a training function returns nothing.
        work: Any = partial(_work, function, output, _threads_per_worker(cluster), events, user_errors)
        trainer: Any = TorchTrainer(
            work,
            torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=cluster.num_workers,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker={
                    "CPU": cluster.cpus_per_worker,
                    **({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
                },
            ),
            run_config=RunConfig(
                # A name that was used before would make Ray resume its own snapshot of that run.
                name=f"{label}-{time.time_ns():x}",
                storage_path=_ray_storage(output),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        # Private, because Ray has no setting for it: its handler of Ctrl-C ends the process by SystemExit, past all who
        # would clean up and say how to go on.
        trainer._register_sigint_handler = lambda controller: None
        if is_own_ray():
            _leave_out_cleaner(trainer)
        listener = _Listener(events, tracker, label, progress)
        try:
            with listener:
                result = trainer.fit().return_value
        except Exception as error:
            _raise_user_error(user_errors)
            error.add_note(f"{label}: the last checkpoint is kept, run the same command again to go on")
            if listener.crash is not None:  # Ray's own message cuts the traceback
                error.add_note(f"On worker {listener.crash.rank}:\n{listener.crash.traceback}")
            raise
        else:
            _raise_user_error(user_errors)
        finally:
            with contextlib.suppress(Exception):  # Ray itself may be gone, and the queue with it
                user_errors.shutdown()
        if result is None:
            raise RuntimeError(f"{label}: the workers ended without a result; run the same command again")
        return result


def _leave_out_cleaner(trainer: Any) -> None:
    """Without Ray's process that frees the workers' places when the controller has died.

    It asks for the controller not the Ray that it runs on but the one that was last started on this machine with
    `ray start`. Where that is gone, each run waits 12 s for it at the end; where it runs, it knows no such controller, and
    the places of workers at work would be freed.
    """
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    create = trainer._create_default_callbacks  # private, because Ray has no setting for it
    trainer._create_default_callbacks = lambda: [
        callback for callback in create() if not isinstance(callback, PlacementGroupCleanerCallback)
    ]


def _raise_user_error(user_errors: Any) -> None:
    if _has_given_up(user_errors):
        raise UserError(user_errors.get())


def _has_given_up(user_errors: Any) -> bool:
    """Whether a worker has found what starting again cannot mend."""
    from ray.exceptions import RayError

    with contextlib.suppress(RayError):
        return not user_errors.empty()
    return False


class _Reporter:
    """Tells the driver of a worker's events. It never waits for the driver, and never fails because of it."""

    def __init__(self, events: Any) -> None:
        self.events, self.last = events, None

    def tell(self, item: Event | _Crash) -> None:
        with contextlib.suppress(Exception):
            self.last = self.events.actor.put_nowait.remote(item)

    def flush(self) -> None:
        """Wait a little for what was told last."""
        import ray

        if self.last is not None:
            with contextlib.suppress(Exception):
                ray.wait([self.last], timeout=FLUSH_TIMEOUT_S)


def _work(
    function: TrainFunction, output: str, threads: int, events: Any, user_errors: Any
) -> TrainResult | None:
    """Runs on every worker; what worker 0 returns arrives at the driver."""
    import torch

    if _has_given_up(user_errors):
        return None
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
    metrics, reporter = MetricsFile(output), _Reporter(events)

    def report(event: Event) -> None:
        metrics.add(event)
        reporter.tell(event)

    rank = int(os.environ.get("RANK", 0))
    try:
        with storage_errors(output):
            result = function(report)
            if rank == 0:
                metrics.write()
        return replace(result, state=None)
    except UserError as error:
        # Raised all the same, so that Ray ends the other workers: they may not have found it (a shard that only this
        # one reads) and wait for this one in a collective.
        with contextlib.suppress(Exception):
            user_errors.put(str(error))
        raise
    except Exception:
        reporter.tell(_Crash(rank, traceback.format_exc()))
        raise
    finally:
        reporter.flush()


class _Listener:
    """Drains the event queue on the driver while the trainer runs."""

    def __init__(self, events: Any, tracker: Tracker | None, label: str, progress: bool) -> None:
        self.events, self.tracker, self.label, self.progress = events, tracker, label, progress
        self.crash: _Crash | None = None
        self._bar: tqdm | None = None
        self._thread = threading.Thread(target=self._drain, daemon=True)

    def __enter__(self) -> _Listener:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(Exception):  # Ray itself may be gone, and the queue with it
            self.events.put(None)
        self._thread.join()
        with contextlib.suppress(Exception):
            self.events.shutdown()
        if self._bar is not None:
            self._bar.close()

    def _drain(self) -> None:
        from ray.exceptions import RayError

        failed: set[str] = set()
        with contextlib.suppress(RayError):
            while (event := self.events.get()) is not None:
                try:
                    self._handle(event)
                except Exception as error:  # what cannot be shown is trained all the same
                    if repr(error) not in failed:
                        log.exception("%s: cannot show %s", self.label, type(event).__name__)
                    failed.add(repr(error))

    def _handle(self, event: Event | _Crash) -> None:
        match event:
            case _Crash():
                # The first of an attempt: the other workers fail because this one has.
                self.crash = self.crash or event
            case RunStarted():
                self.crash = None
                self._start(event)
            case CheckpointSkipped():
                log.warning("%s: %s: going on from an older one", self.label, event.reason)
            case StepSkipped():
                log.warning(
                    "%s: step %d is skipped: its loss (%s) or gradient (%s) is not finite",
                    self.label,
                    event.step,
                    event.loss,
                    event.grad_norm,
                )
            case RolledBack():
                log.warning(
                    "%s: after step %d back to the checkpoint of step %d, with the learning rates times %g",
                    self.label,
                    event.diverged_at,
                    event.step,
                    event.lr_scale,
                )
            case StepDone() | Validated():
                self._show(event)
            case CheckpointDue():
                pass

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
        if self.tracker:
            run = {f"run.{name}": value for name, value in asdict(event).items() if name != "first_step"}
            self.tracker.log_params(run)

    def _show(self, event: StepDone | Validated) -> None:
        if self._bar is not None:
            self._bar.update(event.step - self._bar.n)
            if isinstance(event, StepDone):
                self._bar.set_postfix_str(
                    f"loss {event.loss:.3f} nats/token, {event.tokens_per_second:,.0f} tokens/s"
                )
        if self.tracker:
            prefix = "train" if isinstance(event, StepDone) else "validation"
            values = {f"{prefix}.{name}": value for name, value in asdict(event).items() if name != "step"}
            self.tracker.log_metrics(values, step=event.step)


def _threads_per_worker(cluster: ClusterConfig) -> int:
    """PyTorch threads of one CPU worker: its share of a Ray started here, else the CPUs it reserves."""
    if cluster.address is None:
        return max(1, (cluster.num_cpus or os.cpu_count() or 1) // cluster.num_workers)
    return max(1, int(cluster.cpus_per_worker))


def _ray_storage(output: str) -> str:
    folder = join(output, "logs", "ray_train")
    local = local_path(folder)
    return str(Path(local).absolute()) if local else folder


def _log_folder(output: str) -> str:
    """Where Ray's chatter goes: beside the output, or a temporary folder when that is remote."""
    return local_path(join(output, "logs")) or tempfile.mkdtemp(prefix="llada-logs-")
