"""The command `sft`: a checkpoint and prepared conversations to a fine-tuned checkpoint folder (layout: pretrain.py).

Not another trainer: the data says which positions may be masked and what each row is divided by. Of kind "sft" these are
the answers, one to a row (LLaDA); of kind "unified" all tokens of whole dialogues, as in pretraining (iLLaDA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

from llada.config import Recipe
from llada.data.tokens.manifest import load_dataset_entry, resolve_snapshot
from llada.data.tokens.shards import load_unigram_counts
from llada.diffusion.objective import ObjectiveConfig
from llada.errors import UserError
from llada.files import absolute, join
from llada.model.hf import read_config
from llada.model.lora import LoraConfig
from llada.model.transformer import ModelConfig
from llada.sampling.config import SamplingConfig
from llada.training.optim import OptimConfig
from llada.training.run import RunConfig, TrainConfig
from llada.training.trainer import TrainResult, train
from pipelines.runners.training import run_training
from pipelines.runners.workers import WorkerHooks
from pipelines.stage.artifact import Manifest, fetch_folder, require_same_tokenizer
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.command import Common, Flat, parse, run_command, run_stage, take_recipe
from pipelines.stage.lifecycle import folder_input
from pipelines.stage.samples import text_sampler
from pipelines.stage.tracking import Tracker
from pipelines.stage.training import (
    CHECKPOINTS,
    PROFILE,
    Baseline,
    require_sound,
    save_weights,
    state_of,
    take_baseline,
    training_summary,
)


@dataclass(frozen=True)
class SftArgs:
    """A checkpoint and prepared conversations to a fine-tuned checkpoint folder."""

    model: str
    """Checkpoint folder to start from: ours, GSAI-ML/LLaDA's or iLLaDA's."""
    data: str
    """A folder prepared with --kind sft or unified."""
    common: Annotated[Common, Flat]
    baseline: Annotated[Baseline, Flat]
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig
    lora: LoraConfig
    profile: bool = False
    """Trace some steps of the first worker: profile/trace.json.gz in the output, and the dearest operations beside it."""


def main(argv: Sequence[str]) -> None:
    """`llada sft <preset> …`"""
    args, recipe = parse_words(argv)
    manifest = run_stage(
        "sft",
        sft,
        args.common,
        recipe,
        preset=argv[0],
        model=args.model,
        data=args.data,
        extend=args.common.resume,
        profile=args.profile,
    )
    print(f"{args.common.output}: {training_summary(manifest)}")


def parse_words(argv: Sequence[str]) -> tuple[SftArgs, Recipe]:
    """(the arguments, the recipe that they and the preset make together)."""
    recipe, words = take_recipe(argv, "sft")
    recipe = take_baseline(recipe, words, "sft")
    run = recipe.sft
    defaults = {"objective": run.objective, "optim": run.optim, "train": run.train, "lora": run.lora}
    args = parse(SftArgs, words, "sft <preset>", **defaults)
    return args, replace(recipe, sft=RunConfig(args.objective, args.optim, args.train, args.lora))


def sft(
    recipe: Recipe,
    *,
    model: str,
    data: str,
    output: str,
    cluster: ClusterConfig,
    extend: bool = False,
    profile: bool = False,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> Manifest:
    """Fine-tune the checkpoint folder `model` and return the manifest; goes on where it stopped, skips a finished one.
    `extend` lets a finished run go on to a new length; `profile` traces some steps.

    Raises UserError: no checkpoint, data that is no dialogues or of another tokenizer, and as `pretrain`.
    """
    model, data, output = absolute(model), resolve_snapshot(absolute(data)), absolute(output)
    if load_dataset_entry(data).kind == "pretrain":
        raise UserError(f"{data} is not SFT data: prepare it with `llada prepare … --kind sft` (or unified)")
    local = fetch_folder(model)
    require_same_tokenizer(model, data)
    model_config, _ = read_config(local)
    require_sound(model)
    function = partial(
        sft_worker,
        model_config,
        recipe.sft,
        data,
        output,
        model,
        sampling=recipe.sampling,
        profile=profile,
    )
    return run_training(
        "sft",
        function,
        model_config,
        recipe.sft,
        data=data,
        output=output,
        config=asdict(recipe.sft),
        inputs=[folder_input("data", data), folder_input("model", model)],
        cluster=cluster,
        tracker=tracker,
        extend=extend,
        progress=progress,
    )


def sft_worker(
    model: ModelConfig,
    config: RunConfig,
    data: str,
    output: str,
    start: str,
    hooks: WorkerHooks,
    *,
    sampling: SamplingConfig,
    profile: bool = False,
) -> TrainResult:
    """What every worker does: train from the newest checkpoint in `output`, or from the weights of the folder `start`."""
    number = config.train.samples
    result = train(
        model,
        config,
        data,
        checkpoints=join(output, CHECKPOINTS),
        unigram_counts=load_unigram_counts(data),
        initial_state=state_of(start),
        report=hooks.report,
        should_stop=hooks.should_stop,
        enter=hooks.enter,
        profile_to=join(output, PROFILE) if profile else None,
        write_samples=text_sampler(data, sampling, number=number, seed=config.train.seed) if number else None,
        run_id=hooks.run_id,
    )
    save_weights(output, result, config, start=start)
    return result


if __name__ == "__main__":
    run_command("sft")
