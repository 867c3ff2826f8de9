"""Ray's TorchTrainer as this repository runs it. Imported only where Ray is.

What is overridden is private, because Ray has no setting for it.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.torch.torch_trainer import TorchTrainer

from pipelines.runners.failure_budget import FailureBudget
from pipelines.runners.preemption import LeaveBeforeResize, LeaveOnSigterm
from pipelines.stage.cluster import is_own_ray


class Trainer(TorchTrainer):
    """Runs a function on workers, and again as long as its `budget` of failures allows."""

    def __init__(self, *args: Any, budget: FailureBudget, **options: Any) -> None:
        super().__init__(*args, **options)
        self.budget = budget

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        return super()._initialize_and_run_controller(**{**options, "failure_policy": self.budget})

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's handler of Ctrl-C ends the process by SystemExit, past all who would clean up and say how to go on."""

    def _create_default_callbacks(self) -> list[Any]:
        """With ours, and without two of Ray's.

        One starts a process for datasets, of which there are none, and has every worker import Ray Data.

        One frees the workers' places when the controller has died. It asks for the controller not the Ray that it runs on
        but the one that was last started on this machine with `ray start`. Where that is gone, each run waits 12 s for it
        at the end; where it runs, it knows no such controller, and the places of workers at work would be freed. It is left
        out on a Ray of our own.
        """
        callbacks = super()._create_default_callbacks()
        left_out = (DatasetsCallback, *([PlacementGroupCleanerCallback] if is_own_ray() else []))
        kept = [each for each in callbacks if not isinstance(each, left_out)]
        return [*kept, LeaveOnSigterm(), LeaveBeforeResize()]
