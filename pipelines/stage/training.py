"""A training stage's folder, for `pretrain` and `sft` alike: what stands in it beside the resumable checkpoints.

Worker 0 keeps metrics.jsonl and, at the end, writes the weights; the driver adds the tokenizer, loss.png and the manifest.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from llada.files import file_sizes, join, read_bytes, sha256, storage_errors, write_bytes
from llada.model.hf import save_state
from llada.model.transformer import ModelConfig
from llada.training.events import (
    CheckpointDue,
    Event,
    RunStarted,
    StepDone,
    Validated,
    event_from_json,
    event_to_json,
)
from llada.training.trainer import TrainResult
from pipelines.stage.artifact import Manifest, Output, fetch_folder, put_folder
from pipelines.stage.tracking import Tracker

CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
LOSS_PLOT = "loss.png"
# Settings that an unfinished run may go on with changed, as LLaDA's did after a NaN.
LEARNING_RATES = ("optim.lr", "optim.muon_lr")
# How stale metrics.jsonl may be for somebody who watches it.
METRICS_EVERY_S = 10.0


class MetricsFile:
    """metrics.jsonl, kept by worker 0: before a checkpoint is committed, all that was said until then is in it."""

    def __init__(self, output: str) -> None:
        self.url = join(output, METRICS_FILE)
        self._events: list[StepDone | Validated] = []
        self._written_at = 0.0

    def add(self, event: Event) -> None:
        """Take an event; the file follows within METRICS_EVERY_S seconds, and before every checkpoint."""
        match event:
            case RunStarted():
                # After a crash the steps since the last checkpoint are done again: forget what was said of them.
                self._events = [earlier for earlier in _read(self.url) if earlier.step <= event.first_step]
            case StepDone() | Validated():
                self._events.append(event)
                if time.monotonic() - self._written_at > METRICS_EVERY_S:
                    self.write()
            case CheckpointDue():
                self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        lines = "".join(json.dumps(event_to_json(event)) + "\n" for event in self._events)
        write_bytes(self.url, lines.encode())
        self._written_at = time.monotonic()


def read_metrics(output: str) -> list[StepDone | Validated]:
    """The logged losses and validations of a training folder, in order."""
    return _read(join(output, METRICS_FILE))


def _read(url: str) -> list[StepDone | Validated]:
    try:
        events = [event_from_json(json.loads(line)) for line in read_bytes(url).decode().splitlines()]
    except FileNotFoundError:
        return []
    return [event for event in events if isinstance(event, StepDone | Validated)]


def save_weights(output: str, result: TrainResult, model: ModelConfig) -> None:
    """Write the trained network into the folder, as `llada.load` reads it; nothing where the result has no weights."""
    if result.state is not None:
        with tempfile.TemporaryDirectory() as local:
            save_state(local, result.state, model)
            put_folder(local, output)


def finish_training(
    folder: Output, result: TrainResult, *, tokenizer: str, tracker: Tracker | None
) -> Manifest:
    """Complete the folder of a run that is through: tokenizer (a folder's URL), loss.png, the manifest; returns that."""
    with storage_errors(folder.url):
        put_folder(fetch_folder(tokenizer), folder.url)
        plot_losses(folder.url, folder.stage)
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
    counts = asdict(replace(result, state=None))
    del counts["state"]
    counts["validation_ratio"] = result.validation_loss / result.unigram_loss
    run_id = tracker.wait_started() if tracker else None
    manifest = folder.finish(counts, kind="checkpoint", files=files, mlflow_run_id=run_id)
    if tracker:
        tracker.log_metrics({f"final.{name}": value for name, value in counts.items()}, step=result.num_steps)
        tracker.set_tags({"output.kind": "checkpoint", "output.config_hash": manifest["config_hash"]})
        for name in (LOSS_PLOT, METRICS_FILE, "manifest.json"):
            tracker.log_artifact(join(folder.url, name))
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
