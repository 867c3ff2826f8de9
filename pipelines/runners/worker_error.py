"""What ends a training worker, as it travels to Ray's controller and on to the driver: in words, because of some exceptions
(those of a store's package, say) Ray could not bring back the class."""

from __future__ import annotations

import time
import traceback
from typing import Literal

from llada.errors import UserError
from llada.store_errors import may_pass

Kind = Literal["fault", "user", "store", "preemption"]


class WorkerError(Exception):
    """What has ended a worker.

    Args:
        kind: "user": what only the user can mend. "store": a store that failed, and may be back soon. "preemption": the
            worker was asked to leave, and did. "fault": all else.
        message: one line.
        trace: the traceback.
        at: seconds of the worker's clock.
    """

    def __init__(self, rank: int, kind: Kind, message: str, trace: str, at: float) -> None:
        super().__init__(rank, kind, message, trace, at)
        self.rank, self.kind, self.message, self.trace, self.at = rank, kind, message, trace, at

    def __str__(self) -> str:
        return self.trace if self.kind == "fault" else self.message


def as_worker_error(error: Exception, rank: int) -> WorkerError:
    """The failure to raise in place of an exception that is being handled."""
    # Not above: it brings FSDP, and Ray's controller, which only reads what came of it, would import that too.
    from llada.training.preemption import PreemptedError

    kind: Kind = "fault"
    if isinstance(error, PreemptedError):
        kind = "preemption"
    elif isinstance(error, UserError):
        kind = "store" if may_pass(error) else "user"
    words = f"{type(error).__name__}: {error}" if kind == "fault" else str(error)
    return WorkerError(rank, kind, words, traceback.format_exc(), time.time())


def worker_errors(error: BaseException) -> list[WorkerError]:
    """What the workers of an attempt have met, the first one first: the others fail because that one has."""
    found = getattr(error, "worker_failures", {}).values()
    return sorted((each for each in found if isinstance(each, WorkerError)), key=lambda each: each.at)
