"""Which failures of its workers a training survives: any number while it makes progress, those of lost machines and of stores
that are away apart.

Ray asks it in its controller. Imported only where Ray is.
"""

from __future__ import annotations

import logging
import time

from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy

# Private, because Ray has no public question for what is a preemption.
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from llada.training.checkpoint.folder import complete_checkpoints
from pipelines.runners.worker_error import worker_errors

# Before the workers start again that a store has failed: twice as long each time, within these bounds.
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 60.0

log = logging.getLogger(__name__)


class FailureBudget(FailurePolicy):
    """Ends a run when its workers have failed more than `max_failures` times in a row without a new checkpoint, or were
    taken away more than `max_preemptions` times, or have waited for a store longer than `store_patience_s` without a new
    checkpoint, or when one has met what only the user can mend.

    Args:
        checkpoints: the folder of the run's checkpoints.
    """

    def __init__(
        self, checkpoints: str, max_failures: int, max_preemptions: int | None, store_patience_s: float
    ) -> None:
        super().__init__(FailureConfig(max_failures=max_failures))
        self.checkpoints, self.max_failures, self.max_preemptions = checkpoints, max_failures, max_preemptions
        self.store_patience_s = store_patience_s
        self.newest = self._newest()
        self.failures = self.preemptions = 0
        self.waited_s, self.pause_s = 0.0, FIRST_PAUSE_S

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether Ray starts the workers again."""
        kinds = {failure.kind for failure in worker_errors(training_failed_error)}
        if "user" in kinds:
            return FailureDecision.RAISE
        if "preemption" in kinds or _is_preemption_failure(training_failed_error):
            self.preemptions += 1
            over = self.max_preemptions is not None and self.preemptions > self.max_preemptions
            return FailureDecision.RAISE if over else FailureDecision.RETRY
        cause = getattr(training_failed_error, "controller_failure", None)
        if isinstance(cause, WorkerGroupStartupTimeoutError):  # a machine that is waited for
            return FailureDecision.RETRY
        newest = self._newest()
        has_progressed, self.newest = newest > self.newest, newest
        if has_progressed:
            self.failures, self.waited_s, self.pause_s = 0, 0.0, FIRST_PAUSE_S
        if "store" in kinds:
            return self._wait_for_store()
        self.failures += not has_progressed
        return FailureDecision.RAISE if self.failures > self.max_failures else FailureDecision.RETRY

    def _wait_for_store(self) -> FailureDecision:
        if self.waited_s + self.pause_s > self.store_patience_s:
            return FailureDecision.RAISE
        log.warning("a store has failed the training: the workers start again in %.0f s", self.pause_s)
        time.sleep(self.pause_s)  # of workers, there are none to look after meanwhile
        self.waited_s += self.pause_s
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
        return FailureDecision.RETRY

    def _newest(self) -> int:
        """The step of the newest checkpoint; the one known last where the store does not say."""
        try:
            return max(complete_checkpoints(self.checkpoints), default=0)
        except Exception:
            return getattr(self, "newest", 0)
