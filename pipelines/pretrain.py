"""The command `pretrain`: token shards to a checkpoint folder, by Ray Train and FSDP2.

<output>/config.json, model.safetensors, tokenizer…   what `llada.load` reads
         checkpoints/      resumable training state     metrics.jsonl, loss.png   what happened
         manifest.json     last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

from llada.config import Recipe
from llada.data.tokens.manifest import resolve_snapshot
from llada.data.tokens.shards import load_unigram_counts
from llada.diffusion.objective import ObjectiveConfig
from llada.files import absolute, join
from llada.model.transformer import ModelConfig
from llada.training.events import EventSink
from llada.training.optim import OptimConfig
from llada.training.trainer import RunConfig, TrainConfig, TrainResult, open_splits, train
from pipelines.runners.workers import run_workers
from pipelines.stage.artifact import Manifest
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.command import Common, Flat, parse, run_command, run_stage, take_recipe
from pipelines.stage.lifecycle import begin_stage, folder_input
from pipelines.stage.tracking import Tracker
from pipelines.stage.training import (
    CHECKPOINTS,
    LEARNING_RATES,
    finish_training,
    save_weights,
    training_summary,
)


@dataclass(frozen=True)
class PretrainArgs:
    """Token shards to a checkpoint folder."""

    data: str
    """A prepared folder."""
    common: Annotated[Common, Flat]
    model: ModelConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig


def main(argv: Sequence[str]) -> None:
    """`llada pretrain <preset> …`"""
    recipe, words = take_recipe(argv, "pretrain")
    run = recipe.pretrain
    defaults = {"model": recipe.model, "objective": run.objective, "optim": run.optim, "train": run.train}
    args = parse(PretrainArgs, words, "pretrain <preset>", **defaults)
    recipe = replace(recipe, model=args.model, pretrain=RunConfig(args.objective, args.optim, args.train))
    manifest = run_stage("pretrain", pretrain, args.common, recipe, data=args.data)
    print(f"{args.common.output}: {training_summary(manifest)}")


def pretrain(
    recipe: Recipe,
    *,
    data: str,
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> Manifest:
    """Pretrain on a prepared folder and return the manifest; goes on from the newest checkpoint, skips a finished one.

    Raises UserError: data not prepared, or not fit for the model; output of another run; Ray not reachable.
    """
    data, output = resolve_snapshot(absolute(data)), absolute(output)
    folder = begin_stage(
        "pretrain",
        output,
        config={"model": asdict(recipe.model), **asdict(recipe.pretrain)},
        inputs=[folder_input("data", data)],
        tracker=tracker,
        may_change=LEARNING_RATES,
    )
    if folder.manifest is not None:
        return folder.manifest
    open_splits(data, recipe.model, recipe.pretrain)  # refuses what does not fit before Ray is started
    function = partial(pretrain_worker, recipe.model, recipe.pretrain, data, output)
    result = run_workers(
        function, output=output, cluster=cluster, tracker=tracker, label="pretrain", progress=progress
    )
    return finish_training(folder, result, tokenizer=join(data, "tokenizer"), tracker=tracker)


def pretrain_worker(
    model: ModelConfig, config: RunConfig, data: str, output: str, report: EventSink
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
    run_command("pretrain")
