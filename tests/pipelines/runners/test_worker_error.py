"""Failures of workers on their way to the driver."""

from __future__ import annotations

import pickle

import pytest

from llada.errors import UserError
from llada.store_errors import StoreError
from llada.training.preemption import PreemptedError
from llada.training.trainer import DivergenceError
from pipelines.runners.worker_error import WorkerError, as_worker_error, worker_errors


def away() -> StoreError:
    error = StoreError("s3://bucket: no answer")
    error.may_pass = True
    return error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UserError("optim.lr: lower it"), "user", "optim.lr: lower it"),
        (DivergenceError("the loss is nan"), "user", "the loss is nan"),
        (StoreError("/data: no space left"), "user", "/data: no space left"),
        (away(), "store", "s3://bucket: no answer"),
        (PreemptedError("at step 3"), "preemption", "at step 3"),
        # What Python and libraries raise for a fault of ours is none of the user's.
        (ValueError("shapes differ"), "fault", "ValueError: shapes differ"),
        (ConnectionResetError("by peer"), "fault", "ConnectionResetError: by peer"),
    ],
)
def test_a_failure_keeps_its_kind_and_its_traceback_on_the_way(error, kind, message):
    try:
        raise error
    except Exception as raised:
        failure = pickle.loads(pickle.dumps(as_worker_error(raised, 3)))
    assert (failure.rank, failure.kind, failure.message) == (3, kind, message)
    assert "raise error" in failure.trace
    assert str(failure) == (failure.trace if kind == "fault" else message)


def test_the_first_failure_comes_first():
    failures = {rank: WorkerError(rank, "fault", "", "", at) for rank, at in ((0, 3.0), (1, 1.0), (2, 2.0))}
    group = RuntimeError()
    group.worker_failures = {**failures, 3: RuntimeError("died")}
    assert [failure.rank for failure in worker_errors(group)] == [1, 2, 0]
    assert worker_errors(RuntimeError()) == []
