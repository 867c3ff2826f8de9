"""The command `pretrain`: token shards to a checkpoint folder, by Ray Train and FSDP2.

<output>/config.json, model.safetensors, tokenizer…   what `llada.load` reads
         checkpoints/      resumable training state     metrics.jsonl, loss.png, loss_by_noise.png   what happened
         manifest.json     last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

import tyro

from llada.config import Recipe
from llada.data.tokens.manifest import DatasetEntry, load_dataset_entry, resolve_snapshot
from llada.data.tokens.shards import load_unigram_counts
from llada.diffusion.objective import ObjectiveConfig
from llada.errors import UserError
from llada.files import absolute, join
from llada.model.adapt import diffusion_start
from llada.model.hf import read_config
from llada.model.transformer import ModelConfig
from llada.sampling.config import SamplingConfig
from llada.settings import require
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
class PretrainArgs:
    """Token shards to a checkpoint folder."""

    data: str
    """A prepared folder."""
    common: Annotated[Common, Flat]
    baseline: Annotated[Baseline, Flat]
    model: ModelConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig
    start: Annotated[str | None, tyro.conf.arg(name="model")] = None
    """Checkpoint folder to start from instead of random weights; it brings its network, but for --model.block-length. An
    autoregressive one (Llama, Qwen) becomes bidirectional or block-causal, as the objective asks, and learns the mask; with
    --model.shift a position is still predicted from the one before it."""
    mask_noise: float | None = None
    """How far the row of a mask that such a checkpoint has not is drawn from the mean of all rows, in their spread (1)."""
    profile: bool = False
    """Trace some steps of the first worker: profile/trace.json.gz in the output, and the dearest operations beside it."""


def main(argv: Sequence[str]) -> None:
    """`llada pretrain <preset> …`"""
    args, recipe = parse_words(argv)
    manifest = run_stage(
        "pretrain",
        pretrain,
        args.common,
        recipe,
        preset=argv[0],
        data=args.data,
        model=args.start,
        mask_noise=args.mask_noise,
        extend=args.common.resume,
        profile=args.profile,
    )
    print(f"{args.common.output}: {training_summary(manifest)}")


def parse_words(argv: Sequence[str]) -> tuple[PretrainArgs, Recipe]:
    """(the arguments, the recipe that they and the preset make together)."""
    recipe, words = take_recipe(argv, "pretrain")
    recipe = take_baseline(recipe, words, "pretrain")
    run = recipe.pretrain
    defaults = {"model": recipe.model, "objective": run.objective, "optim": run.optim, "train": run.train}
    args = parse(PretrainArgs, words, "pretrain <preset>", **defaults)
    require(
        args.start is None
        or replace(args.model, block_length=None, shift=False)
        == replace(recipe.model, block_length=None, shift=False),
        f"--model {args.start} brings its own network: leave out the settings --model.… but block-length and shift",
    )
    return args, replace(
        recipe,
        model=args.model,
        pretrain=replace(run, objective=args.objective, optim=args.optim, train=args.train),
    )


def pretrain(
    recipe: Recipe,
    *,
    data: str,
    output: str,
    cluster: ClusterConfig,
    model: str | None = None,
    mask_noise: float | None = None,
    extend: bool = False,
    profile: bool = False,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> Manifest:
    """Pretrain on a prepared folder and return the manifest; goes on from the newest checkpoint, skips a finished one.

    Args:
        model: checkpoint folder whose network and weights to start from, instead of the recipe's and random ones. Of the
            recipe's network the block length counts, for block diffusion.
        mask_noise: of the mask's row where an autoregressive checkpoint has none (`llada.model.adapt`); None: 1.
        extend: let a finished run go on to a new length.
        profile: trace some steps.

    Raises UserError: data not prepared, or not fit for the model; output of another run; Ray not reachable.
    """
    require(recipe.pretrain.lora.rank is None, "lora is for sft: leave pretrain.lora out of the recipe")
    data, output = resolve_snapshot(absolute(data)), absolute(output)
    network, inputs = recipe.model, [folder_input("data", data)]
    config, gets_mask = asdict(recipe.pretrain), False
    if model is not None:
        model = absolute(model)
        require_same_tokenizer(model, data)
        source, _ = read_config(fetch_folder(model))
        require_sound(model)
        network = start_network(source, recipe, load_dataset_entry(data))
        gets_mask = source.mask_token_id is None and network.mask_token_id is not None
        inputs.append(folder_input("model", model))
    require(
        mask_noise is None or gets_mask,
        "mask_noise is for the mask of an autoregressive checkpoint that has none: leave it out",
    )
    if gets_mask:
        mask_noise = 1.0 if mask_noise is None else mask_noise
        config["mask_noise"] = mask_noise
    function = partial(
        pretrain_worker,
        network,
        recipe.pretrain,
        data,
        output,
        model,
        mask_noise,
        sampling=recipe.sampling,
        profile=profile,
    )
    return run_training(
        "pretrain",
        function,
        network,
        recipe.pretrain,
        data=data,
        output=output,
        config={"model": network.content(), **config},
        inputs=inputs,
        cluster=cluster,
        tracker=tracker,
        extend=extend,
        progress=progress,
    )


def start_network(source: ModelConfig, recipe: Recipe, data: DatasetEntry) -> ModelConfig:
    """The network that is trained from a checkpoint with the network `source`: the same, but that an autoregressive one
    becomes what another objective needs, and that block diffusion may begin, or choose other blocks."""
    kind, blocks = recipe.pretrain.objective.kind, recipe.model.block_length
    require(
        blocks is None or kind == "block_diffusion",
        f"model.block_length={blocks} is for objective.kind block_diffusion, not {kind}: leave it out",
    )
    blocks = source.block_length if blocks is None else blocks
    if not source.causal or kind == "autoregressive":
        require(
            not recipe.model.shift or source.shift,
            "model.shift is kept from an autoregressive network that becomes another: leave it out",
        )
        return replace(source, block_length=blocks)
    mask_token_id = data.mask_token_id if source.mask_token_id is None else source.mask_token_id
    if mask_token_id is None:
        raise UserError(
            "neither the data nor the model has a mask token: prepare the data with `llada prepare`"
        )
    return diffusion_start(
        source, mask_token_id, vocab_size=data.vocab_size, block_length=blocks, shift=recipe.model.shift
    )


def pretrain_worker(
    model: ModelConfig,
    config: RunConfig,
    data: str,
    output: str,
    start: str | None,
    mask_noise: float | None,
    hooks: WorkerHooks,
    *,
    sampling: SamplingConfig,
    profile: bool = False,
) -> TrainResult:
    """What every worker does: train from the newest checkpoint in `output`, or from the weights of the folder `start`, or
    from random ones."""
    number = config.train.samples
    result = train(
        model,
        config,
        data,
        checkpoints=join(output, CHECKPOINTS),
        unigram_counts=load_unigram_counts(data),
        initial_state=None
        if start is None
        else state_of(start, model, mask_noise=mask_noise or 0.0, seed=config.train.seed),
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
    run_command("pretrain")
