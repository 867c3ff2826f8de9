"""The stage `sft`: a checkpoint and prepared conversations to a fine-tuned checkpoint folder (layout: pretrain.py).

Not another trainer: the data says which positions may be masked (the answers) and what each row is divided by.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from llada.config import Recipe
from llada.data.tokens.manifest import resolve_snapshot
from llada.files import absolute
from llada.model.hf import read_config
from pipelines.runners.workers import LEARNING_RATES, TrainingJob, threads_per_worker, train_stage
from pipelines.stage.artifact import (
    StageError,
    fetch_folder,
    find_manifest,
    folder_id,
    open_output,
    read_manifest,
    require_same_tokenizer,
)
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.tracking import Tracker


def sft(
    recipe: Recipe,
    *,
    model: str,
    data: str,
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tune the checkpoint folder `model` and return the manifest; goes on where it stopped, skips a finished one.

    Raises StageError: no checkpoint, data that is not of kind "sft" or of another tokenizer, and as `pretrain`.
    """
    model, data, output = absolute(model), resolve_snapshot(absolute(data)), absolute(output)
    source = read_manifest(data)
    if source.get("dataset", {}).get("kind") != "sft":
        raise StageError(f"{data} is not SFT data: prepare it with `llada prepare … --kind sft`")
    local = fetch_folder(model)
    require_same_tokenizer(model, data)
    try:
        model_config, _ = read_config(local)
    except (ValueError, FileNotFoundError) as error:
        raise StageError(str(error)) from error
    folder = open_output(
        output,
        stage="sft",
        config=asdict(recipe.sft),
        inputs=[{"url": url, "id": folder_id(url)} for url in (data, model)],
        may_change=LEARNING_RATES,
    )
    if folder.manifest is not None:
        return folder.manifest
    if tracker:
        tracker.log_params(asdict(recipe.sft))
        tracker.log_input(data, context="data", manifest=source)
        tracker.log_input(model, context="model", manifest=find_manifest(model))
    job = TrainingJob(model_config, recipe.sft, data, output, model, threads_per_worker(cluster))
    return train_stage(folder, job, cluster, tracker, progress=progress)


if __name__ == "__main__":
    from pipelines.cli import main

    main(["sft", *sys.argv[1:]])
