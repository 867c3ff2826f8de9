"""What our trainer changes of Ray's is private: it must still be what Ray calls."""

from __future__ import annotations

import inspect

import pytest
from ray.train.v2._internal.execution import callback
from ray.train.v2.torch.torch_trainer import TorchTrainer

from pipelines.runners.preemption import LeaveBeforeResize, LeaveOnSigterm
from pipelines.runners.ray_trainer import Trainer

pytestmark = pytest.mark.integration


def test_what_is_overridden_is_there():
    for name in vars(Trainer):
        if name.startswith("_") and not name.startswith("__"):
            assert hasattr(TorchTrainer, name), name
    assert "failure_policy=" in inspect.getsource(TorchTrainer.fit)
    ours = {*vars(LeaveOnSigterm), *vars(LeaveBeforeResize)}
    for name in ours:
        if not name.startswith("_"):
            kinds = (callback.WorkerCallback, callback.ControllerCallback, callback.WorkerGroupCallback)
            assert any(hasattr(kind, name) for kind in kinds), name
