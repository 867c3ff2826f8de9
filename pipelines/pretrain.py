"""The stage `pretrain`: token shards to a checkpoint folder, by Ray Train and FSDP2.

<output>/config.json, model.safetensors, tokenizer…   what `llada.load` reads
         checkpoints/      resumable training state     metrics.jsonl, loss.png   what happened
         manifest.json     last
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

from llada.config import Recipe
from llada.data.tokens.shards import load_unigram_counts
from llada.files import absolute, join
from llada.model.transformer import ModelConfig
from llada.training.events import Report
from llada.training.trainer import RunConfig, TrainResult, open_splits, train
from pipelines.runners.workers import run_workers
from pipelines.stage.artifact import folder_id, newest_snapshot, open_output, read_manifest
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.tracking import Tracker
from pipelines.stage.training import CHECKPOINTS, LEARNING_RATES, finish_training, save_weights


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

    Raises UserError: data not prepared, or not fit for the model; output of another run; Ray not reachable.
    """
    data, output = newest_snapshot(absolute(data)), absolute(output)
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
    open_splits(data, recipe.model, recipe.pretrain)  # refuses what does not fit before Ray is started
    function = partial(pretrain_worker, recipe.model, recipe.pretrain, data, output)
    result = run_workers(
        function, output=output, cluster=cluster, tracker=tracker, label="pretrain", progress=progress
    )
    return finish_training(folder, result, tokenizer=join(data, "tokenizer"), tracker=tracker)


def pretrain_worker(
    model: ModelConfig, config: RunConfig, data: str, output: str, report: Report
) -> TrainResult:
    """What every worker does: train from the newest checkpoint in `output`, or from random weights."""
    result = train(
        model,
        config,
        data,
        checkpoints=join(output, CHECKPOINTS),
        unigram_counts=load_unigram_counts(data),
        report=report,
    )
    save_weights(output, result, model)
    return result


if __name__ == "__main__":
    from pipelines.cli import main

    main(["pretrain", *sys.argv[1:]])
