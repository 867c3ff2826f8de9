"""Which failures end a run: those that are the user's, and too many in a row that made no checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from pipelines.runners import failure_budget
from pipelines.runners.failure_budget import FailureBudget
from pipelines.runners.worker_error import WorkerError

pytestmark = pytest.mark.integration
RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


def of_worker(kind: str) -> WorkerGroupError:
    died = WorkerHealthCheckFailedError("died", failure=ActorDiedError())
    return WorkerGroupError("", {0: WorkerError(0, kind, "", "", 0.0), 1: died})


def checkpoint(folder: Path, step: int) -> None:
    (folder / f"step-{step:08d}").mkdir(parents=True)
    (folder / f"step-{step:08d}" / "state.json").write_text("{}")


def test_failures_in_a_row_without_a_checkpoint_end_a_run(tmp_path):
    checkpoint(tmp_path, 3)  # of an earlier attempt
    budget = FailureBudget(str(tmp_path), max_failures=2, max_preemptions=None, store_patience_s=0)
    assert [budget.make_decision(of_worker("fault")) for _ in range(2)] == [RETRY, RETRY]
    for step in (4, 5, 6):
        checkpoint(tmp_path, step)
        decisions = [budget.make_decision(of_worker(kind)) for kind in ("fault", "fault", "fault")]
        assert decisions == [RETRY, RETRY, RETRY]
    assert budget.make_decision(of_worker("fault")) == RAISE


def test_what_only_the_user_can_mend_ends_a_run_at_once(tmp_path):
    assert FailureBudget(str(tmp_path), 3, None, 60).make_decision(of_worker("user")) == RAISE


def test_machines_that_are_taken_away_have_a_budget_of_their_own(tmp_path):
    told = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [0]}))
    budget = FailureBudget(str(tmp_path), max_failures=0, max_preemptions=3, store_patience_s=0)
    decisions = [budget.make_decision(error) for error in (told, of_worker("preemption"), told, told)]
    assert decisions == [RETRY, RETRY, RETRY, RAISE]
    endless = FailureBudget(str(tmp_path), max_failures=0, max_preemptions=None, store_patience_s=0)
    assert {endless.make_decision(told) for _ in range(50)} == {RETRY}


def test_a_machine_may_be_waited_for_but_not_one_that_fails(tmp_path):
    budget = FailureBudget(str(tmp_path), max_failures=1, max_preemptions=None, store_patience_s=0)
    waiting = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
    assert {budget.make_decision(waiting) for _ in range(9)} == {RETRY}
    failing = ControllerError(WorkerGroupStartupFailedError("no such image"))
    assert [budget.make_decision(failing) for _ in range(2)] == [RETRY, RAISE]


def test_a_store_that_does_not_say_is_no_progress(tmp_path):
    budget = FailureBudget(f"unknown-protocol://{tmp_path}", 1, None, store_patience_s=0)
    assert [budget.make_decision(of_worker("fault")) for _ in range(2)] == [RETRY, RAISE]


def test_a_store_is_waited_for_longer_and_longer_and_not_for_ever(tmp_path, monkeypatch):
    """Pauses of 0.01, 0.02, 0.04, 0.04 ... s, and 0.2 in all. The attempts are no failures, and a checkpoint begins anew."""
    monkeypatch.setattr(failure_budget, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(failure_budget, "LONGEST_PAUSE_S", 0.04)
    budget = FailureBudget(str(tmp_path), max_failures=1, max_preemptions=None, store_patience_s=0.2)
    away = of_worker("store")
    for step in (0, 1):
        checkpoint(tmp_path, step)
        begin = time.monotonic()
        decisions = [budget.make_decision(away) for _ in range(6)]
        assert decisions == [RETRY] * 6
        assert time.monotonic() - begin >= 0.19
    assert budget.make_decision(of_worker("fault")) == RETRY
    assert budget.make_decision(away) == RAISE
    assert FailureBudget(str(tmp_path), 3, None, store_patience_s=0).make_decision(away) == RAISE
