"""A training stage, for `pretrain` and `sft` alike: how its folder begins, what its workers do, how it ends.

Beside the resumable checkpoints, worker 0 keeps the record (metrics.py) and, at the end, writes the weights; the driver adds
the tokenizer, loss.png, loss_by_noise.png and the manifest.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from llada.config import Recipe
from llada.errors import UserError
from llada.files import file_sizes, join, sha256, storage_errors, write_bytes
from llada.model.adapt import start_state
from llada.model.hf import open_state
from llada.model.hf_config import read_config, read_end_ids
from llada.model.initial import Rows
from llada.model.lora import MergedWeights
from llada.model.peft import save_adapter
from llada.model.transformer import ModelConfig
from llada.presets import Twin, twin
from llada.settings import flatten_settings, require
from llada.training.checkpoint.folder import complete_checkpoints
from llada.training.events import StepDone, Validated
from llada.training.export import export_weights
from llada.training.parallel import copy_size, full_state, world
from llada.training.run import IDENTITY_SETTINGS, RunConfig
from llada.training.trainer import TrainResult
from pipelines.stage.artifact import (
    Manifest,
    Output,
    fetch_folder,
    find_manifest,
    put_folder,
)
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.command import parse_known
from pipelines.stage.lifecycle import StageInput, begin_stage, told_change
from pipelines.stage.loss_by_noise import NOISE_PLOT, plot_loss_by_noise
from pipelines.stage.metrics import METRICS_FILE, merge_metrics, read_metrics
from pipelines.stage.tracking import Tracker

CHECKPOINTS = "checkpoints"
PROFILE = "profile"
LOSS_PLOT = "loss.png"
ADAPTER = "adapter"
# Settings of a run's length and schedule, with which also a finished one may be extended.
SCHEDULE = (
    "train.num_steps",
    "train.num_epochs",
    "optim.warmup_steps",
    "optim.decay",
    "optim.decay_fraction",
    "optim.final_lr_ratio",
    "optim.drops",
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Baseline:
    """Another objective than the preset's."""

    twin: Twin | None = None
    """Train a baseline for a fair comparison, the preset's network on the same data and budget: "ar" predicts the next token
    (causal attention), "bert" masks a fixed 15 %."""


def take_baseline(recipe: Recipe, words: Sequence[str], command: str) -> Recipe:
    """The recipe, or that of the twin which the words ask for."""
    kind = parse_known(Baseline, words, f"{command} <preset>").twin
    return recipe if kind is None else twin(recipe, kind)


def begin_training(
    stage: str,
    output: str,
    *,
    config: dict[str, Any],
    inputs: Sequence[StageInput],
    tracker: Tracker | None,
    extend: bool,
) -> Output:
    """Open the folder of a training stage (see `begin_stage`); `extend` lets a finished run go on to a new length.

    Raises UserError when the folder belongs to other work, or has nothing left to go on from.
    """
    finished = find_manifest(output) if extend else None
    if finished is not None and _lengths(finished["config"]) == _lengths(config):
        finished = None
    with storage_errors(output):
        checkpoints = complete_checkpoints(join(output, CHECKPOINTS))
    if finished is not None and not checkpoints:
        raise UserError(
            f"{output} has no checkpoints any more to go on from: start from its weights, "
            f"llada pretrain … --model {output} --output <another folder>"
        )
    folder = begin_stage(
        stage,
        output,
        config=config,
        inputs=inputs,
        tracker=tracker,
        in_force=settings_in_force(config),
        may_change=may_change(config),
        may_extend=SCHEDULE,
        defaults=flatten_settings(asdict(RunConfig())),
        done=checkpoints[-1] if checkpoints else 0,
        extend=extend and (finished is not None or find_manifest(output) is None),
    )
    if tracker and not folder.is_complete:
        tracker.log_record()
    if folder.history and not folder.is_complete:
        last = folder.history[-1]
        log.warning("%s: since step %d: %s", stage, last["step"], told_change(last))
    if finished is not None:
        log.warning(
            "%s: the finished run goes on behind its %s steps; the learning rate is from there on that of the schedule "
            "of the whole, longer run",
            stage,
            f"{finished['counts']['num_steps']:,}",
        )
    return folder


def may_change(config: Mapping[str, Any]) -> list[str]:
    """Settings that an unfinished run may go on with changed, as LLaDA's did with another rate after a NaN: those of training
    and optimizer that are no part of what the run is. (Its schedule must be asked for by `extend`.)"""
    return [
        name
        for name in flatten_settings(config)
        if name.startswith(("train.", "optim.")) and name not in (*IDENTITY_SETTINGS, *SCHEDULE)
    ]


def require_sound(checkpoint: str) -> None:
    """Refuse a folder to start from whose weights are not those that its manifest lists. (Without one, nobody knows.)"""
    folder = fetch_folder(checkpoint)
    manifest: Mapping[str, Any] = find_manifest(str(folder)) or {}
    for name, entry in manifest.get("files", {}).items():
        path = folder / name
        if name.endswith(".safetensors") and not (path.is_file() and sha256(str(path)) == entry["sha256"]):
            raise UserError(
                f"{join(checkpoint, name)} is not the file that its manifest.json lists (missing, or another checksum): copy "
                "the folder again, or delete its manifest.json if it was changed on purpose"
            )


def require_copies(config: RunConfig, cluster: ClusterConfig) -> None:
    """Refuse copies of the weights that a group of this size cannot form. (One that changes its size then has a single one.)"""
    workers, sharing = cluster.num_workers, config.train.shard_workers
    require(
        not isinstance(workers, int) or copy_size(workers, sharing) == (sharing or workers),
        f"train.shard_workers {sharing} does not divide the {workers} workers: choose a divisor, or leave it out",
    )


def _lengths(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return config["train"]["num_steps"], config["train"]["num_epochs"]


def settings_in_force(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of a training run that the others leave a meaning, by their dotted names."""
    settings = flatten_settings(config)
    idle = []
    if settings["optim.optimizer"] != "muon":
        idle += [name for name in settings if name.startswith("optim.muon_")]
    if settings["train.num_steps"] is not None:
        idle.append("train.num_epochs")
    if settings["optim.decay_fraction"] == 0:
        idle += ["optim.decay", "optim.final_lr_ratio"]
    if settings["objective.kind"] == "autoregressive":
        idle += ["objective.schedule", "objective.subs", "objective.carry_over"]
        idle += [name for name in settings if name.startswith("objective.time.")]
    if settings["objective.time.density"] != "bell":
        idle += [name for name in settings if name.startswith("objective.time.bell_")]
    if settings["lora.rank"] is None:
        idle += [name for name in settings if name.startswith("lora.") and name != "lora.rank"]
    return {name: value for name, value in settings.items() if name not in idle}


def state_of(
    checkpoint: str, network: ModelConfig | None = None, *, mask_noise: float = 1.0, seed: int = 0
) -> dict[str, Rows]:
    """The weights of a checkpoint folder, for a training that starts from them: each worker reads the rows that it holds.

    Args:
        network: what is trained, if that is not the folder's own (`llada.model.adapt.diffusion_start`).
        mask_noise, seed: of the rows that it has besides (`start_state`).
    """
    folder = fetch_folder(checkpoint)
    config, layout = read_config(folder)
    state = open_state(folder, config, layout)
    if network is None:
        return state
    return start_state(state, config, network, mask_noise=mask_noise, seed=seed)


def save_weights(output: str, result: TrainResult, config: RunConfig, *, start: str | None = None) -> None:
    """Write the trained network into the folder, as `llada.load` reads it; adapters merged into the checkpoint `start`, and in
    the folder ADAPTER by themselves. What ended a text for `start` still does. A collective of the workers."""
    assert result.model is not None
    network = result.model.config
    weights: Mapping[str, torch.Tensor] = dict(result.model.named_parameters())
    if config.lora.rank is not None:
        assert start is not None
        base, adapters = fetch_folder(start), full_state(result.model)
        _, layout = read_config(base)
        if world()[0] == 0:
            with tempfile.TemporaryDirectory() as local:
                save_adapter(local, adapters, config.lora, network, layout=layout, base=start)
                put_folder(local, join(output, ADAPTER))
        weights = MergedWeights(open_state(base, network, layout), adapters, config.lora.scale)
    export_weights(
        output,
        weights,
        network,
        dtype=getattr(torch, config.train.export_dtype),
        end_ids=read_end_ids(fetch_folder(start), network) if start else (),
    )


def finish_training(
    folder: Output, result: TrainResult, *, tokenizer: str, tracker: Tracker | None
) -> Manifest:
    """Complete the folder of a run that is through: tokenizer (a folder's URL), loss.png, the manifest; returns that."""
    with storage_errors(folder.url):
        put_folder(fetch_folder(tokenizer), folder.url)
        merge_metrics(folder.url)
        plots = [LOSS_PLOT]
        plot_losses(folder.url, folder.stage)
        if plot_loss_by_noise(read_metrics(folder.url), folder.url, folder.stage):
            plots.append(NOISE_PLOT)
        sizes = {
            name: size
            for name, size in file_sizes(folder.url).items()
            if name.endswith((".json", ".safetensors"))
            and "/" not in name
            and name not in ("stage.json", "tracking.json")
        }
        files = {
            name: {"bytes": size, "sha256": sha256(join(folder.url, name))} for name, size in sizes.items()
        }
    counts = asdict(replace(result, model=None))
    del counts["model"]
    counts["validation_ratio"] = result.validation_loss / result.unigram_loss
    run_id = tracker.wait_started() if tracker else None
    manifest = folder.finish(counts, kind="checkpoint", files=files, mlflow_run_id=run_id)
    if tracker:
        tracker.log_record()
        tracker.log_metrics({f"final.{name}": value for name, value in counts.items()}, step=result.num_steps)
        tracker.set_tags({"output.kind": "checkpoint", "output.config_hash": manifest["config_hash"]})
        for name in (*plots, METRICS_FILE, "manifest.json"):
            tracker.log_artifact(join(folder.url, name))
        tracker.log_model(folder.url, step=result.num_steps)
    return manifest


def plot_losses(output: str, title: str) -> str:
    """Draw the training loss and the validation bound of a folder into its loss.png; the picture's URL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    events = read_metrics(output)
    validations = [event for event in events if isinstance(event, Validated)]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, label, style in ((StepDone, "training", "-"), (Validated, "validation bound", "o-")):
        points = [(event.step, event.loss) for event in events if isinstance(event, kind)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    if validations:
        unigram = validations[-1].loss / validations[-1].ratio
        axes.axhline(unigram, color="gray", linestyle="--", linewidth=1, label="unigram baseline")
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    plt.close(figure)
    write_bytes(join(output, LOSS_PLOT), buffer.getvalue())
    return join(output, LOSS_PLOT)


def training_summary(manifest: Mapping[str, Any]) -> str:
    """A line on what a training stage has done."""
    counts = manifest["counts"]
    return (
        f"{counts['num_steps']:,} steps, {counts['tokens']:,} tokens, validation bound "
        f"{counts['validation_loss']:.4f} nats/token ({counts['validation_ratio']:.2f} × unigram)"
    )
