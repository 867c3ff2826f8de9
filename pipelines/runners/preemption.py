"""Workers that are asked to leave: by SIGTERM, by a machine that Ray is going to lose, by a group that changes its size. They
save a checkpoint first (llada/training/preemption.py). Imported only where Ray is."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

import ray

# Private, because the public callbacks come too late, or not to the workers.
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context

# How long the workers of a group that is to change its size may take for their last checkpoint.
RESIZE_GRACE_S = 600.0
_ANSWER_S = 30.0
_POLL_S = 0.2

log = logging.getLogger(__name__)
_asked = threading.Event()


def ask_to_leave() -> None:
    """Of this worker; it does so behind a checkpoint."""
    _asked.set()


def is_asked_to_leave() -> bool:
    """Of this worker.

    Ray's public question, `get_preemption_info`, waits for all workers to ask it; they agree among themselves here.
    """
    return _asked.is_set() or get_train_context().preemption_context.preemption_info is not None


class LeaveOnSigterm(WorkerCallback):
    """The first SIGTERM asks a worker to leave; the second one ends it, as Ray has it. Python looks for signals in the main
    thread, so it takes until Ray's next look at the worker."""

    def after_init_train_context(self) -> None:
        """Runs in the main thread of each worker, before its work begins."""
        before: Any = signal.getsignal(signal.SIGTERM)

        def leave(number: int, frame: FrameType | None) -> None:
            ask_to_leave()
            signal.signal(signal.SIGTERM, before)

        signal.signal(signal.SIGTERM, leave)


class LeaveBeforeResize(ControllerCallback, WorkerGroupCallback):
    """Lets a group that is at work save a checkpoint before Ray starts another one in its place. Runs in the controller."""

    def __init__(self) -> None:
        self._group: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Keeps it in mind."""
        self._group = worker_group

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Forgets it."""
        self._group = None

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Wait until the group has left; not for one that has failed."""
        if self._group is None or (status := self._group.get_latest_poll_status()) is None or status.errors:
            return
        actors = [worker.actor for worker in self._group.get_workers()]
        deadline = time.monotonic() + RESIZE_GRACE_S
        try:
            ray.get([actor.execute.remote(ask_to_leave) for actor in actors], timeout=_ANSWER_S)
            while time.monotonic() < deadline:
                statuses = ray.get([actor.poll_status.remote() for actor in actors], timeout=_ANSWER_S)
                if not all(status.running for status in statuses):
                    return
                time.sleep(_POLL_S)
        except Exception:  # of those that die meanwhile the last checkpoint is left
            log.warning("the workers did not leave in good order", exc_info=True)
