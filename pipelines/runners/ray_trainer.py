"""Ray's TorchTrainer as this repository runs it. Imported only where Ray is.

What is overridden is private, because Ray has no setting for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group
from ray.train.v2.torch.torch_trainer import TorchTrainer

from pipelines.runners.failure_budget import FailureBudget
from pipelines.runners.preemption import LeaveBeforeResize, LeaveOnSigterm
from pipelines.stage.own_ray import is_own_ray

log = logging.getLogger(__name__)


class NoProcessGroup(TorchConfig):
    """Of a worker that stays alone: gloo would keep a thread that looks for messages, a third of a percent of a core."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend


class UnscaledGroup(FixedScalingPolicy):
    """Workers of a fixed number, on a Ray that no machine will join: Ray starts a process that asks for machines, and has it
    import Ray Data."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Asks for nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Nor later."""


class FreePlaces(ControllerCallback, WorkerGroupCallback):
    """Frees the places of workers that die while their group starts: Ray has not taken the group on by then, and forgets it,
    so that the next one might wait for those places for ever. Runs in the controller."""

    def __init__(self) -> None:
        self._starting: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """The workers are there."""
        self._starting = worker_group

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """They are at work, and Ray looks after them."""
        self._starting = None

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Something has failed; it may be the start."""
        forgotten, self._starting = self._starting, None
        if forgotten is not None:
            try:
                forgotten.shutdown()
            except Exception:
                log.warning("the places of workers that did not start are not free", exc_info=True)


class GroupOfOurs(WorkerGroup):
    """Workers of a Ray that this process has started, whose controller runs in it."""

    _places: Any = None

    def _start(self) -> None:
        try:
            super()._start()
        except KeyboardInterrupt:  # of Exceptions, Ray itself takes care
            if self._places is not None:
                self._places.shutdown()
            raise

    def _create_placement_group(self, *args: Any) -> Any:
        self._places = super()._create_placement_group(*args)
        return self._places

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """As Ray does, but for what only those need who report to Ray: a barrier, and an actor that keeps the checkpoints."""
        told = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=None,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[number] for name, values in train_context_args.items()},
            )
            for number, worker in enumerate(workers)
        ]
        ray.get(told)
        self._decorate_worker_log_file_paths(workers)

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        """Without what they have inherited: for a runtime environment, Ray starts a process that starts the worker."""
        return custom_runtime_env


class ControllerOfOurs(TrainController):
    """Runs in the driver."""

    worker_group_cls = GroupOfOurs


class NoBarrier:
    """In place of the actor at which workers meet that report to Ray Train; ours do not."""

    @classmethod
    def options(cls, **_: Any) -> type[NoBarrier]:
        return cls

    @classmethod
    def remote(cls, **_: Any) -> NoBarrier:
        return cls()


@contextlib.contextmanager
def _no_barrier() -> Iterator[None]:
    """For a `with` block, a group of workers has none."""
    places: list[tuple[Any, str, Any]] = [
        (worker_group, "SynchronizationActor", NoBarrier),
        (state, "_shutdown_sync_actor", lambda _: None),
    ]
    kept = [getattr(module, name) for module, name, _ in places]
    for module, name, instead in places:
        setattr(module, name, instead)
    try:
        yield
    finally:
        for (module, name, _), before in zip(places, kept, strict=True):
            setattr(module, name, before)


class Trainer(TorchTrainer):
    """Runs a function on workers, and again as long as its `budget` of failures allows."""

    def __init__(self, *args: Any, budget: FailureBudget, **options: Any) -> None:
        super().__init__(*args, **options)
        self.budget = budget

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["failure_policy"] = self.budget
        if is_own_ray() and isinstance(self.scaling_config.num_workers, int):
            scaling: Any = self.scaling_config  # that of Ray Train, in spite of its declared type
            options["scaling_policy"] = UnscaledGroup(scaling)
        if not is_own_ray() or asyncio._get_running_loop() is not None:  # as in a notebook
            return super()._initialize_and_run_controller(**options)
        # A process of its own would be one more to start, and would survive nothing that this one does not.
        with _no_barrier():
            controller = ControllerOfOurs(**options)
            try:
                asyncio.run(controller.run())
            except BaseException:
                if (group := controller.get_worker_group()) is not None:
                    group.abort()
                raise
            return controller.get_result()

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
        return [*kept, LeaveOnSigterm(), LeaveBeforeResize(), FreePlaces()]
