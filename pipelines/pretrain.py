"""The stage `pretrain`: token shards to a checkpoint folder, by Ray Train and FSDP2.

<output>/config.json, model.safetensors, tokenizer…   what `llada.load` reads
         checkpoints/      resumable training state     metrics.jsonl, loss.png   what happened
         manifest.json     last
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from llada.config import Recipe
from llada.data.tokens.manifest import resolve_snapshot
from llada.files import absolute
from pipelines.runners.workers import LEARNING_RATES, TrainingJob, threads_per_worker, train_stage
from pipelines.stage.artifact import folder_id, open_output, read_manifest
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.tracking import Tracker


def pretrain(
    recipe: Recipe,
    *,
    data: str,
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Pretrain on a prepared folder and return the manifest; goes on from the newest checkpoint, skips a finished one.

    Raises StageError: data not prepared, or not fit for the model; output of another run; Ray not reachable.
    """
    data, output = resolve_snapshot(absolute(data)), absolute(output)
    source = read_manifest(data)
    config = {"model": asdict(recipe.model), **asdict(recipe.pretrain)}
    folder = open_output(
        output,
        stage="pretrain",
        config=config,
        inputs=[{"url": data, "id": folder_id(data)}],
        may_change=LEARNING_RATES,
    )
    if folder.manifest is not None:
        return folder.manifest
    if tracker:
        tracker.log_params(config)
        tracker.log_input(data, context="data", manifest=source)
    job = TrainingJob(recipe.model, recipe.pretrain, data, output, None, threads_per_worker(cluster))
    return train_stage(folder, job, cluster, tracker, progress=progress)


if __name__ == "__main__":
    from pipelines.cli import main

    main(["pretrain", *sys.argv[1:]])
