"""The stage `sft`: a checkpoint and prepared conversations to a fine-tuned checkpoint folder (layout: pretrain.py).

Not another trainer: the data says which positions may be masked (the answers) and what each row is divided by.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from llada.config import Recipe
from llada.data.tokens.shards import load_unigram_counts
from llada.errors import UserError
from llada.files import absolute, join
from llada.model.hf import load_model, read_config
from llada.model.transformer import ModelConfig
from llada.training.events import Report
from llada.training.trainer import RunConfig, TrainResult, open_splits, train
from pipelines.runners.workers import run_workers
from pipelines.stage.artifact import (
    fetch_folder,
    find_manifest,
    folder_id,
    newest_snapshot,
    open_output,
    read_manifest,
    require_same_tokenizer,
)
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.tracking import Tracker
from pipelines.stage.training import CHECKPOINTS, LEARNING_RATES, finish_training, save_weights


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

    Raises UserError: no checkpoint, data that is not of kind "sft" or of another tokenizer, and as `pretrain`.
    """
    model, data, output = absolute(model), newest_snapshot(absolute(data)), absolute(output)
    source = read_manifest(data)
    if source.get("dataset", {}).get("kind") != "sft":
        raise UserError(f"{data} is not SFT data: prepare it with `llada prepare … --kind sft`")
    local = fetch_folder(model)
    require_same_tokenizer(model, data)
    model_config, _ = read_config(local)
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
    open_splits(data, model_config, recipe.sft)  # refuses what does not fit before Ray is started
    function = partial(sft_worker, model_config, recipe.sft, model, data, output)
    result = run_workers(
        function, output=output, cluster=cluster, tracker=tracker, label="sft", progress=progress
    )
    return finish_training(folder, result, tokenizer=join(data, "tokenizer"), tracker=tracker)


def sft_worker(
    model_config: ModelConfig, config: RunConfig, model: str, data: str, output: str, report: Report
) -> TrainResult:
    """What every worker does: train from the newest checkpoint in `output`, or from the weights of the folder `model`."""
    network = load_model(fetch_folder(model), dtype=torch.float32)
    result = train(
        model_config,
        config,
        data,
        checkpoints=join(output, CHECKPOINTS),
        unigram_counts=load_unigram_counts(data),
        initial_state={name: parameter.detach() for name, parameter in network.named_parameters()},
        report=report,
    )
    save_weights(output, result, model_config)
    return result


if __name__ == "__main__":
    from pipelines.cli import main

    main(["sft", *sys.argv[1:]])
