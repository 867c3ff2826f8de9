"""A training stage from its settings to its manifest, for `pretrain` and `sft` alike: what is refused, the folder, the workers,
the end. The function that the workers run is the command's, so that the loss stays two files from there."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from llada.files import join, storage_errors
from llada.model.transformer import ModelConfig
from llada.training.checkpoint.lease import Lease
from llada.training.run import RunConfig, open_splits
from pipelines.runners.workers import TrainFunction, run_workers
from pipelines.stage.artifact import Manifest, find_manifest
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.lifecycle import StageInput
from pipelines.stage.tracking import Tracker
from pipelines.stage.training import CHECKPOINTS, begin_training, finish_training, require_copies


def run_training(
    stage: str,
    function: TrainFunction,
    network: ModelConfig,
    run: RunConfig,
    *,
    data: str,
    output: str,
    config: Mapping[str, Any],
    inputs: Sequence[StageInput],
    cluster: ClusterConfig,
    tracker: Tracker | None,
    extend: bool,
    progress: bool,
) -> Manifest:
    """Train `network` on a prepared folder in `function`, and complete the folder `output`; its manifest.

    Args:
        function: goes on from the checkpoints in `output`, and leaves the weights there.
        config, inputs: what the folder is for (`begin_training`).

    Raises UserError, before anything is written: data that does not fit, an output of another run or at which another process
    is at work; later what `run_workers` raises.
    """
    require_copies(run, cluster)
    run_id = uuid.uuid4().hex
    lease = Lease(join(output, CHECKPOINTS), run_id)
    with storage_errors(output):
        lease.require_free()
    if extend or find_manifest(output) is None:
        open_splits(data, network, run)
    folder = begin_training(stage, output, config=dict(config), inputs=inputs, tracker=tracker, extend=extend)
    if folder.manifest is not None:
        return folder.manifest
    with lease:  # which the workers take over
        result = run_workers(
            function,
            output=output,
            cluster=cluster,
            tracker=tracker,
            label=stage,
            progress=progress,
            run_id=run_id,
        )
        return finish_training(folder, result, tokenizer=join(data, "tokenizer"), tracker=tracker)
