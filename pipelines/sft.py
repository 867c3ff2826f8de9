"""The command `sft`: a checkpoint and prepared conversations to a fine-tuned checkpoint folder (layout: pretrain.py).

Not another trainer: the data says which positions may be masked (the answers) and what each row is divided by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated

from llada.config import Recipe
from llada.data.tokens.shards import resolve_snapshot
from llada.errors import UserError
from llada.files import absolute
from llada.model.hf import read_config
from llada.training.batches import ObjectiveConfig
from llada.training.optim import OptimConfig
from llada.training.trainer import RunConfig, TrainConfig
from pipelines.runners.workers import (
    LEARNING_RATES,
    TrainingJob,
    threads_per_worker,
    train_stage,
    training_summary,
)
from pipelines.stage.artifact import Manifest, fetch_folder, read_manifest, require_same_tokenizer
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.command import Common, Flat, parse, run_command, run_stage, take_recipe
from pipelines.stage.lifecycle import begin_stage, folder_input
from pipelines.stage.tracking import Tracker


@dataclass(frozen=True)
class SftArgs:
    """A checkpoint and prepared conversations to a fine-tuned checkpoint folder."""

    model: str
    """Checkpoint folder to start from: ours, GSAI-ML/LLaDA's or iLLaDA's."""
    data: str
    """A folder prepared with --kind sft."""
    common: Annotated[Common, Flat]
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig


def main(argv: Sequence[str]) -> None:
    """`llada sft <preset> …`"""
    recipe, words = take_recipe(argv, "sft")
    run = recipe.sft
    defaults = {"objective": run.objective, "optim": run.optim, "train": run.train}
    args = parse(SftArgs, words, "sft <preset>", **defaults)
    recipe = replace(recipe, sft=RunConfig(args.objective, args.optim, args.train))
    manifest = run_stage("sft", sft, args.common, recipe, model=args.model, data=args.data)
    print(f"{args.common.output}: {training_summary(manifest)}")


def sft(
    recipe: Recipe,
    *,
    model: str,
    data: str,
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> Manifest:
    """Fine-tune the checkpoint folder `model` and return the manifest; goes on where it stopped, skips a finished one.

    Raises UserError: no checkpoint, data that is not of kind "sft" or of another tokenizer, and as `pretrain`.
    """
    model, data, output = absolute(model), resolve_snapshot(absolute(data)), absolute(output)
    if read_manifest(data).get("dataset", {}).get("kind") != "sft":
        raise UserError(f"{data} is not SFT data: prepare it with `llada prepare … --kind sft`")
    local = fetch_folder(model)
    require_same_tokenizer(model, data)
    model_config, _ = read_config(local)
    folder = begin_stage(
        "sft",
        output,
        config=asdict(recipe.sft),
        inputs=[folder_input("data", data), folder_input("model", model)],
        tracker=tracker,
        may_change=LEARNING_RATES,
    )
    if folder.manifest is not None:
        return folder.manifest
    job = TrainingJob(model_config, recipe.sft, data, output, model, threads_per_worker(cluster))
    return train_stage(folder, job, cluster, tracker, progress=progress)


if __name__ == "__main__":
    run_command("sft")
