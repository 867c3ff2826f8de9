"""A training function on N Ray Train workers: what `pretrain` and `sft` do their work with.

Ray starts the workers, joins them in a process group and starts them again after a crash; the loop itself is
llada.training.trainer.train, which finds its own newest checkpoint. Ray's dataset iterator and checkpoint store are not
used: the iterator forgets its position at a restart (Ray 2.60), ours is arithmetic.

What worker 0 reports goes into the record (stage/metrics.py) and to the driver, which shows the progress and talks to MLflow. A UserError of any worker ends the run; every other exception is tried again, and the last one reaches
the terminal with its remote traceback.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llada.errors import UserError
from llada.files import join, local_path, storage_errors
from llada.training.events import Event, EventSink
from llada.training.trainer import TrainResult
from pipelines.runners.listener import Crash, Listener, Reporter
from pipelines.stage.cluster import ClusterConfig, connect, is_own_ray, require_room
from pipelines.stage.metrics import MetricsRecord
from pipelines.stage.tracking import Tracker

# Worker crashes survived in one run.
MAX_FAILURES = 3
# A GPU node may have to be started first; Ray's own limit is 60 s.
WORKER_START_TIMEOUT_S = "1800"

log = logging.getLogger(__name__)

TrainFunction = Callable[[EventSink], TrainResult]
"""What every worker runs, inside its process group. Picklable; it may be run again, and then goes on."""


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
        listener = Listener(events, tracker, label, progress)
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


def _work(
    function: TrainFunction, output: str, threads: int, events: Any, user_errors: Any
) -> TrainResult | None:
    """Runs on every worker; what worker 0 returns arrives at the driver."""
    import torch

    if _has_given_up(user_errors):
        return None
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
    record, reporter = MetricsRecord(output), Reporter(events)

    def report(event: Event) -> None:
        record.add(event)
        reporter.tell(event)

    rank = int(os.environ.get("RANK", 0))
    try:
        with storage_errors(output):
            result = function(report)
        return replace(result, model=None)
    except UserError as error:
        # Raised all the same, so that Ray ends the other workers: they may not have found it (a shard that only this
        # one reads) and wait for this one in a collective.
        with contextlib.suppress(Exception):
            user_errors.put(str(error))
        raise
    except Exception:
        reporter.tell(Crash(rank, traceback.format_exc()))
        raise
    finally:
        record.close()
        reporter.flush()


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
