"""The Ray Train shell around llada.training: what `pretrain` and `sft` share.

Ray starts the workers, joins them in a process group and starts them again after a crash; the loop itself is
llada.training.trainer.train, which finds its own newest checkpoint. Ray's dataset iterator and checkpoint store are not
used: the iterator forgets its position at a restart (Ray 2.60), ours is arithmetic.

Worker 0 writes metrics.jsonl, in step with the checkpoints; its events travel to the driver too, which shows the
progress and talks to MLflow.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llada.data.tokens.shards import TokenDataset, load_unigram_counts
from llada.errors import UserError
from llada.files import file_sizes, join, local_path, read_bytes, sha256, write_bytes
from llada.model.hf import load_model, save_state
from llada.model.transformer import ModelConfig
from llada.training.trainer import RunConfig, TrainResult, check_fit, train
from pipelines.stage.artifact import Manifest, Output, fetch_folder, put_folder, storage_errors
from pipelines.stage.cluster import ClusterConfig, connect
from pipelines.stage.tracking import Tracker

MAX_FAILURES = 3  # worker crashes survived in one run
WORKER_START_TIMEOUT_S = "1800"  # a GPU node may have to be started first; Ray's own limit is 60 s
METRICS_FILE = "metrics.jsonl"
LEARNING_RATES = ("optim.lr", "optim.muon_lr")  # may change when a run goes on, as LLaDA's did after a NaN
METRICS_EVERY_S = 10.0  # how stale the file may be for somebody who watches it


@dataclass(frozen=True)
class TrainingJob:
    """What every worker gets. `initial_model` is a checkpoint folder to start from, None starts from random weights."""

    model: ModelConfig
    config: RunConfig
    data: str
    output: str
    initial_model: str | None
    threads: int  # of PyTorch on each worker, on CPUs


def train_stage(
    folder: Output, job: TrainingJob, cluster: ClusterConfig, tracker: Tracker | None, *, progress: bool
) -> dict[str, Any]:
    """Train on the cluster into the opened `folder` and finish it; its manifest.

    Raises UserError for what the user can mend.
    """
    with storage_errors(job.output), connect(cluster, _log_folder(job.output)):
        result = _run(job, cluster, tracker, label=folder.stage, progress=progress)
        put_folder(fetch_folder(join(job.data, "tokenizer")), job.output)
        plot_losses(job.output, folder.stage)
        return _finish(folder, result, tracker)


def _run(
    job: TrainingJob, cluster: ClusterConfig, tracker: Tracker | None, *, label: str, progress: bool
) -> TrainResult:
    """Train, leave the model's files in `job.output`, and return the figures (without weights)."""
    try:
        check_fit(job.model, job.config, TokenDataset(job.data))
        TokenDataset(job.data, "validation")
    except ValueError as error:
        raise UserError(str(error)) from error

    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", WORKER_START_TIMEOUT_S)
    events, failures = Queue(), Queue()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "events": events, "failures": failures},
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": cluster.cpus_per_worker,
                **({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
            },
        ),
        run_config=RayRunConfig(
            # A name that was used before would make Ray resume its own snapshot of that run.
            name=f"{label}-{time.time_ns():x}",
            storage_path=_ray_storage(job.output),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    listener = _Listener(events, tracker, label, progress)
    try:
        with storage_errors(job.output), listener:
            trainer.fit()
    except UserError:
        raise
    except ray.exceptions.RayError as error:
        raise UserError(f"{label}: Ray failed: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if failures.empty():
            reason = str(error).strip().splitlines()
            raise UserError(
                f"{label}: a worker failed {MAX_FAILURES + 1} times ({reason[-1] if reason else error}); the last "
                f"checkpoint is kept, run the same command again to go on"
            ) from error
    finally:
        failure = None if failures.empty() else failures.get()
        failures.shutdown()
    if failure is not None:
        raise UserError(failure)
    if listener.result is None:
        raise UserError(f"{label}: the workers ended without a result; run the same command again to go on")
    return listener.result


def _ray_storage(output: str) -> str:
    folder = join(output, "logs", "ray_train")
    local = local_path(folder)
    return str(Path(local).absolute()) if local else folder


def _worker(settings: dict[str, Any]) -> None:
    """Runs on every worker, inside its process group."""
    import torch

    job: TrainingJob = settings["job"]
    rank = int(os.environ.get("RANK", 0))
    if not torch.cuda.is_available():
        torch.set_num_threads(job.threads)

    metrics = _MetricsFile(join(job.output, METRICS_FILE))

    def report(event: dict[str, Any]) -> None:
        metrics.add(event)
        settings["events"].put(event)

    if not settings["failures"].empty():
        return  # started again after a failure that starting again cannot mend
    try:
        with storage_errors(job.output):
            initial_state = None
            if job.initial_model is not None:
                model = load_model(fetch_folder(job.initial_model), dtype=torch.float32)
                initial_state = {name: p.detach() for name, p in model.named_parameters()}
            result = train(
                job.model,
                job.config,
                job.data,
                checkpoints=join(job.output, "checkpoints"),
                unigram_counts=load_unigram_counts(job.data),
                initial_state=initial_state,
                report=report,
            )
            if rank == 0:
                assert result.state is not None
                with tempfile.TemporaryDirectory() as folder:
                    save_state(folder, result.state, job.model)
                    put_folder(folder, job.output)
                report({"event": "end", **asdict(replace(result, state=None))})
    except (ValueError, FileNotFoundError, FloatingPointError, UserError) as error:
        # The user's to mend. Raised all the same, so that Ray ends the other workers: they may not have found it (a
        # shard that only this one reads) and wait for this one in a collective.
        settings["failures"].put(str(error))
        raise


class _MetricsFile:
    """metrics.jsonl, kept by worker 0: before a checkpoint is committed, all that was said until then is in it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._lines: list[dict[str, Any]] = []
        self._written_at = 0.0

    def add(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            # After a crash the steps since the last checkpoint are done again: forget what was said of them.
            self._lines = [line for line in _read_lines(self.url) if line["step"] <= event["first_step"]]
        elif event["event"] in ("step", "validation"):
            self._lines.append(event)
            if time.monotonic() - self._written_at > METRICS_EVERY_S:
                self._write()
        elif event["event"] in ("checkpoint", "end"):
            self._write()

    def _write(self) -> None:
        write_bytes(self.url, "".join(json.dumps(line) + "\n" for line in self._lines).encode())
        self._written_at = time.monotonic()


class _Listener:
    """Drains the event queue on the driver while the trainer runs."""

    def __init__(self, events: Any, tracker: Tracker | None, label: str, progress: bool) -> None:
        self.events, self.tracker, self.label, self.progress = events, tracker, label, progress
        self.result: TrainResult | None = None
        self._bar: tqdm | None = None
        self._thread = threading.Thread(target=self._drain, daemon=True)

    def __enter__(self) -> _Listener:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(Exception):  # Ray itself may be gone, and the queue with it
            self.events.put(None)
        self._thread.join()
        with contextlib.suppress(Exception):
            self.events.shutdown()
        if self._bar is not None:
            self._bar.close()

    def _drain(self) -> None:
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            while (event := self.events.get()) is not None:
                self._handle(event)

    def _handle(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "end":
            self.result = TrainResult(**event)
            return
        if kind == "start":
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(
                total=event["num_steps"],
                initial=event["first_step"],
                desc=self.label,
                unit="step",
                disable=not self.progress,
                leave=False,
            )
            if self.tracker:
                self.tracker.log_params({f"run.{k}": v for k, v in event.items() if k != "first_step"})
            return
        if kind == "checkpoint":
            return
        if self._bar is not None:
            self._bar.update(event["step"] - self._bar.n)
            if kind == "step":
                self._bar.set_postfix_str(
                    f"loss {event['loss']:.3f} nats/token, {event['tokens_per_second']:,.0f} tokens/s"
                )
        if self.tracker:
            prefix = "train" if kind == "step" else "validation"
            values = {f"{prefix}.{k}": v for k, v in event.items() if k != "step"}
            self.tracker.log_metrics(values, step=event["step"])


def _read_lines(url: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in read_bytes(url).decode().splitlines()]
    except FileNotFoundError:
        return []


def read_metrics(output: str) -> list[dict[str, Any]]:
    """The events of a training folder, in order."""
    return _read_lines(join(output, METRICS_FILE))


def plot_losses(output: str, title: str) -> str:
    """Draw the training loss and the validation bound of a folder into its loss.png; the picture's URL."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(output)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, label, style in (("step", "training", "-"), ("validation", "validation bound", "o-")):
        points = [(line["step"], line["loss"]) for line in lines if line["event"] == kind]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    ratios = [line for line in lines if line["event"] == "validation"]
    if ratios:
        unigram = ratios[-1]["loss"] / ratios[-1]["ratio"]
        axes.axhline(unigram, color="gray", linestyle="--", linewidth=1, label="unigram baseline")
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    plt.close(figure)
    write_bytes(join(output, "loss.png"), buffer.getvalue())
    return join(output, "loss.png")


def _finish(folder: Output, result: TrainResult, tracker: Tracker | None) -> dict[str, Any]:
    """Write the manifest of a training folder and tell MLflow the end of the story."""
    counts = {k: v for k, v in asdict(replace(result, state=None)).items() if k != "state"}
    counts["validation_ratio"] = result.validation_loss / result.unigram_loss
    kept = {n: size for n, size in file_sizes(folder.url).items() if n.endswith((".json", ".safetensors"))}
    files = {
        name: {"bytes": size, "sha256": sha256(join(folder.url, name))}
        for name, size in kept.items()
        if "/" not in name and name not in ("stage.json", "tracking.json")
    }
    run_id = tracker.wait_started() if tracker else None
    manifest = folder.finish(counts, kind="checkpoint", files=files, mlflow_run_id=run_id)
    if tracker:
        tracker.log_metrics({f"final.{k}": v for k, v in counts.items()}, step=result.num_steps)
        tracker.set_tags({"output.kind": "checkpoint", "output.config_hash": manifest["config_hash"]})
        for name in ("loss.png", METRICS_FILE, "manifest.json"):
            tracker.log_artifact(join(folder.url, name))
    return manifest


def training_summary(manifest: Manifest) -> str:
    """A line on what a training stage has done."""
    counts = manifest["counts"]
    return (
        f"{counts['num_steps']:,} steps, {counts['tokens']:,} tokens, validation bound "
        f"{counts['validation_loss']:.4f} nats/token ({counts['validation_ratio']:.2f} × unigram)"
    )


def threads_per_worker(cluster: ClusterConfig) -> int:
    """PyTorch threads of one CPU worker: its share of a Ray started here, else the CPUs it reserves."""
    if cluster.address is None:
        return max(1, (cluster.num_cpus or os.cpu_count() or 1) // cluster.num_workers)
    return max(1, int(cluster.cpus_per_worker))


def _log_folder(output: str) -> str:
    """Where Ray's chatter goes: beside the output, or a temporary folder when that is remote."""
    return local_path(join(output, "logs")) or tempfile.mkdtemp(prefix="llada-logs-")
