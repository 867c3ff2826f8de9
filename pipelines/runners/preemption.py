"""Workers that are asked to leave: by SIGTERM, or by a machine that Ray is going to lose. They save a checkpoint
first (llada/training/preemption.py). Imported only where Ray is."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# Private, because the public callbacks do not come to the workers.
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

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
