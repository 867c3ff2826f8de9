"""A training function on N Ray Train workers: what `pretrain` and `sft` do their work with.

Ray starts the workers, joins them in a process group and starts them again after a crash; the loop itself is
llada.training.trainer.train, which finds its own newest checkpoint. Ray's dataset iterator and checkpoint store are not
used: the iterator forgets its position at a restart (Ray 2.60), ours is arithmetic.

What worker 0 reports goes into the record (stage/metrics.py) and to the driver, which shows the progress and talks to
MLflow. What only the user can mend ends the run; after every other failure the workers start again as long as they make
progress (failure_budget.py), and the last one reaches the terminal with its remote traceback.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from llada.errors import UserError
from llada.files import join, local_path, storage_errors
from llada.training.events import Event, EventSink
from llada.training.trainer import TrainResult
from llada.training.watch import Hang, HangWatch
from pipelines.runners.channel import Channel, FileChannel, QueueChannel
from pipelines.runners.listener import HungWorker, Listener, Reporter
from pipelines.runners.worker_error import as_worker_error, worker_errors
from pipelines.stage.cluster import ClusterConfig, connect, require_room
from pipelines.stage.metrics import MetricsRecord
from pipelines.stage.own_ray import is_own_ray
from pipelines.stage.tracking import Tracker
from pipelines.stage.training import CHECKPOINTS

# A GPU node may have to be started first; Ray's own limit is 60 s ...
WORKER_START_TIMEOUT_S = "1800"
# ... which is enough for a group that takes what is there, and looks again where a machine is gone that Ray still counts.
ELASTIC_START_TIMEOUT_S = "60"
# All workers wait for one that hangs, and find it out at about the same time: so long each of them may take to say so.
HANG_GRACE_S = 5.0


@dataclass(frozen=True)
class WorkerHooks:
    """What a worker's function gets from its runner; all of it goes to `train`."""

    report: EventSink
    should_stop: Callable[[], bool]
    enter: Callable[[str], None]
    run_id: str | None = None
    """The same in all attempts of a run."""


TrainFunction = Callable[[WorkerHooks], TrainResult]
"""What every worker runs, inside its process group. Picklable; it may be run again, and then goes on."""


def run_workers(
    function: TrainFunction,
    *,
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None,
    label: str,
    progress: bool,
    run_id: str | None = None,
) -> TrainResult:
    """What `function` returned on worker 0, without the weights: it has to leave those in the folder `output`.

    Raises UserError for what the user can mend, and Ray's own exception with the worker's traceback for everything else
    that has used up the cluster's `max_failures`.
    """
    log_folder = _log_folder(output)
    with storage_errors(output), connect(cluster, log_folder):
        from ray.train.v2.api.config import RunConfig, ScalingConfig

        from pipelines.runners.failure_budget import FailureBudget
        from pipelines.runners.ray_trainer import NoProcessGroup, TorchConfig, Trainer

        require_room("num_workers", cluster.min_workers, cluster.cpus_per_worker, cluster.gpus_per_worker)
        is_elastic = cluster.min_workers < cluster.max_workers
        timeout_s = ELASTIC_START_TIMEOUT_S if is_elastic else WORKER_START_TIMEOUT_S
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", timeout_s)
        events = FileChannel() if is_own_ray() else QueueChannel()
        trainer = Trainer(
            partial(_work, function, output, cluster, events, run_id),
            budget=FailureBudget(
                join(output, CHECKPOINTS),
                cluster.max_failures,
                cluster.max_preemptions,
                cluster.store_patience_s,
            ),
            torch_config=NoProcessGroup()
            if cluster.max_workers == 1
            else TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=cluster.num_workers,
                elastic_resize_monitor_interval_s=cluster.resize_every_s,
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
            ),
        )
        try:
            with Listener(events, tracker, label, progress=progress, log_folder=log_folder):
                fitted: Any = trainer.fit()
        except Exception as error:
            failures = worker_errors(error)
            for failure in failures:
                if failure.kind in ("user", "store"):
                    raise UserError(failure.message) from error
            error.add_note(
                f"{label}: {cluster.max_failures + 1} failures without a new checkpoint in between are one too many "
                "(max_failures of the cluster file); the last checkpoint is kept, run the same command again to go on"
            )
            if failures:  # Ray's own message cuts the traceback
                error.add_note(f"On worker {failures[0].rank}:\n{failures[0].trace}")
            raise
        return TrainResult(**fitted.return_value)


def _work(
    function: TrainFunction, output: str, cluster: ClusterConfig, events: Channel, run_id: str | None
) -> dict[str, Any]:
    """Runs on every worker; what worker 0 returns, a TrainResult's fields, arrives at the driver. As such, because Ray's
    controller reads it on the way, and would import the trainer for it."""
    import torch

    from pipelines.runners.preemption import is_asked_to_leave

    rank, num_workers = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    if not torch.cuda.is_available():
        torch.set_num_threads(_threads_per_worker(cluster, num_workers))
    record, reporter = MetricsRecord(output), Reporter(events)

    def report(event: Event) -> None:
        record.add(event)
        reporter.tell(event)

    watch = HangWatch(partial(_end_hung, rank, reporter), floor_s=cluster.hang_timeout_s)
    try:
        with storage_errors(output):
            result = function(WorkerHooks(report, is_asked_to_leave, watch.enter, run_id))
        return asdict(replace(result, model=None))
    except Exception as error:
        failure = as_worker_error(error, rank)
        reporter.tell(failure)
        raise failure from None
    finally:
        watch.close()
        record.close()
        reporter.flush()


def _end_hung(rank: int, reporter: Reporter, hang: Hang) -> None:
    """End this process, whose training thread can be ended in no other way; Ray starts the workers again."""
    reporter.tell(HungWorker(rank, hang))
    reporter.flush()
    time.sleep(HANG_GRACE_S)
    os._exit(1)


def _threads_per_worker(cluster: ClusterConfig, num_workers: int) -> int:
    """PyTorch threads of one CPU worker: its share of a Ray started here, else the CPUs it reserves."""
    if cluster.address is None:
        return max(1, (cluster.num_cpus or os.cpu_count() or 1) // num_workers)
    return max(1, int(cluster.cpus_per_worker))


def _ray_storage(output: str) -> str:
    folder = join(output, "logs", "ray_train")
    local = local_path(folder)
    return str(Path(local).absolute()) if local else folder


def _log_folder(output: str) -> str:
    """Where Ray's chatter goes: beside the output, or a temporary folder when that is remote."""
    return local_path(join(output, "logs")) or tempfile.mkdtemp(prefix="llada-logs-")
