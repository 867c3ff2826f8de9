"""What our trainer changes of Ray's is private: it must still be what Ray calls."""

from __future__ import annotations

import inspect

import pytest
from ray.train.v2._internal.execution import callback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2.torch.torch_trainer import TorchTrainer

from pipelines.runners.preemption import LeaveBeforeResize, LeaveOnSigterm
from pipelines.runners.ray_trainer import FreePlaces, GroupOfOurs, Trainer, UnscaledGroup

pytestmark = pytest.mark.integration


def test_what_is_overridden_is_there():
    for name in vars(Trainer):
        if name.startswith("_") and not name.startswith("__"):
            assert hasattr(TorchTrainer, name), name
    for option in ("failure_policy=", "scaling_policy="):
        assert option in inspect.getsource(TorchTrainer.fit)
    for name in vars(UnscaledGroup):
        # Pickle leaves notes of its own.
        assert name.startswith("__") or hasattr(FixedScalingPolicy, name), name
    for name in vars(GroupOfOurs):
        assert name.startswith("__") or name == "_places" or hasattr(WorkerGroup, name), name
    tells = inspect.getsource(WorkerGroup._init_train_context_on_workers)
    for name in set(inspect.signature(RayTrainWorker.init_train_context).parameters) - {"self"}:
        assert (f"{name}=" in tells) == (
            f"{name}=" in inspect.getsource(GroupOfOurs._init_train_context_on_workers)
        ), name
    ours = {*vars(LeaveOnSigterm), *vars(LeaveBeforeResize), *vars(FreePlaces)}
    for name in ours:
        if not name.startswith("_"):
            kinds = (callback.WorkerCallback, callback.ControllerCallback, callback.WorkerGroupCallback)
            assert any(hasattr(kind, name) for kind in kinds), name
