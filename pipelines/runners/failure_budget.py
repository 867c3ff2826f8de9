"""Which failures of its workers a training survives: any number while it makes progress, those of lost machines apart.

Ray asks it in its controller. Imported only where Ray is.
"""

from __future__ import annotations

from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy

# Private, because Ray has no public question for what is a preemption.
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from llada.training.checkpoint.folder import complete_checkpoints
from pipelines.runners.worker_error import worker_errors


class FailureBudget(FailurePolicy):
    """Ends a run when its workers have failed more than `max_failures` times in a row without a new checkpoint, or were
    taken away more than `max_preemptions` times, or one has met what only the user can mend.

    Args:
        checkpoints: the folder of the run's checkpoints.
    """

    def __init__(self, checkpoints: str, max_failures: int, max_preemptions: int | None) -> None:
        super().__init__(FailureConfig(max_failures=max_failures))
        self.checkpoints, self.max_failures, self.max_preemptions = checkpoints, max_failures, max_preemptions
        self.newest = self._newest()
        self.failures = self.preemptions = 0

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
        self.failures = 0 if newest > self.newest else self.failures + 1
        self.newest = newest
        return FailureDecision.RAISE if self.failures > self.max_failures else FailureDecision.RETRY

    def _newest(self) -> int:
        """The step of the newest checkpoint; the one known last where the store does not say."""
        try:
            return max(complete_checkpoints(self.checkpoints), default=0)
        except Exception:
            return getattr(self, "newest", 0)
