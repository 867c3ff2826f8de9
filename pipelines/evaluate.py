"""The stage `evaluate`: a checkpoint's perplexity bound on held-out shards, and samples of its text.

    <output>/results.json      the figures, with every setting they were made with
             samples.jsonl     what it writes                  rows/  per-block figures (what a rerun skips)
             manifest.json     last

Blocks of rows go through a Ray Data actor pool, each actor with one copy of the model. The noise belongs to the row, so
the number of actors changes nothing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

import llada
from llada.data.tokens.manifest import resolve_snapshot
from llada.data.tokens.shards import TokenDataset, load_unigram_counts
from llada.diffusion.likelihood import bound_samples, resolve_mask_id, summarise_bound
from llada.files import absolute, join, read_bytes, write_bytes
from llada.model.hf import read_config
from llada.sampling.sampler import SamplingConfig
from llada.sampling.text import complete_texts
from llada.training.parallel import resolve_precision, training_device
from pipelines.runners.actors import map_blocks, require_checkpoint
from pipelines.stage.artifact import (
    StageError,
    fetch_folder,
    find_manifest,
    folder_id,
    open_output,
    read_manifest,
    require_same_tokenizer,
    storage_errors,
)
from pipelines.stage.cluster import ClusterConfig, connect
from pipelines.stage.tracking import Tracker

Task = Literal["perplexity", "samples"]


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and how exactly."""

    tasks: tuple[Task, ...] = ("perplexity", "samples")
    split: str = "validation"
    max_rows: int | None = 1024  # of the split, from its start; None scores all
    num_samples: int = 4  # masks per row
    rows_per_block: int = 64
    document_mask: bool = True
    seed: int = 0
    prompts: tuple[str, ...] = ("",)  # completed by the task "samples"
    sampling: SamplingConfig = SamplingConfig()


def evaluate(
    config: EvaluateConfig,
    *,
    model: str,
    data: str | None,
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate the checkpoint folder `model`, by the prepared folder `data` for perplexity; the manifest.

    Raises StageError: no checkpoint; perplexity without data, or with data of another vocabulary.
    """
    if "perplexity" in config.tasks and data is None:
        raise StageError("the task perplexity needs --data, a prepared folder")
    model, output, data = absolute(model), absolute(output), data and resolve_snapshot(absolute(data))
    require_checkpoint(model)
    if data and "perplexity" in config.tasks:
        _check_fit(model, data)
    inputs = [{"url": url, "id": folder_id(url)} for url in (model, data) if url]
    folder = open_output(output, stage="evaluate", config=asdict(config), inputs=inputs)
    if folder.manifest is not None:
        return folder.manifest
    if tracker:
        tracker.log_params(asdict(config))
        tracker.log_input(model, context="model", manifest=find_manifest(model))
        if data:
            tracker.log_input(data, context="data", manifest=read_manifest(data))
    results: dict[str, Any] = {}
    with storage_errors(output), connect(cluster, join(output, "logs")):
        if "perplexity" in config.tasks:
            assert data is not None
            results |= _perplexity(config, model, data, output, cluster, progress)
        if "samples" in config.tasks:
            results["samples"] = _samples(config, model, output)
    write_bytes(join(output, "results.json"), (json.dumps(results, indent=2) + "\n").encode())
    counts = {k: v for k, v in results.items() if isinstance(v, int | float)}
    if tracker:
        tracker.log_metrics(counts)
    run_id = tracker.wait_started() if tracker else None
    manifest = folder.finish(counts, kind="evaluation", mlflow_run_id=run_id, results=results)
    if tracker:
        for name in ("results.json", "manifest.json"):
            tracker.log_artifact(join(output, name))
    return manifest


def _check_fit(model: str, data: str) -> None:
    """Refuse data that this network cannot score, before any actor is started."""
    try:
        network, _ = read_config(fetch_folder(model))
    except (ValueError, FileNotFoundError) as error:
        raise StageError(str(error)) from error
    if network.causal:
        raise StageError(
            f"{model} is autoregressive: its held-out loss is exact and stands in its metrics.jsonl"
        )
    info = read_manifest(data).get("dataset", {})
    if info.get("vocab_size", 0) > network.vocab_size or info.get("mask_token_id") != network.mask_token_id:
        raise StageError(
            f"{data} ({info.get('vocab_size')} ids, mask {info.get('mask_token_id')}) does not fit {model} "
            f"({network.vocab_size} ids, mask {network.mask_token_id}): prepare it with the model's tokenizer"
        )
    require_same_tokenizer(model, data)


def _perplexity(
    config: EvaluateConfig, model: str, data: str, output: str, cluster: ClusterConfig, progress: bool
) -> dict[str, Any]:
    dataset = TokenDataset(data, config.split)
    num_rows = min(len(dataset), config.max_rows or len(dataset))
    if num_rows == 0:
        raise StageError(f"{data} has no rows in its split {config.split!r}")
    blocks = [
        {"name": f"{start:010d}", "start": start, "end": min(start + config.rows_per_block, num_rows)}
        for start in range(0, num_rows, config.rows_per_block)
    ]
    settings = {"model": model, "data": data, "config": config, "num_rows": num_rows}
    samples, tokens, unigram = [], [], 0.0
    for block in map_blocks(
        _Scorer,
        blocks,
        settings,
        output=join(output, "rows"),
        cluster=cluster,
        label="evaluate",
        progress=progress,
    ):
        samples.append(torch.tensor(block["nats"], dtype=torch.float64))
        tokens.append(torch.tensor(block["tokens"]))
        unigram += block["unigram_nats"]
    bound = summarise_bound(torch.cat(samples, dim=1), torch.cat(tokens))
    num_tokens = int(torch.cat(tokens).sum())
    return {
        "nats_per_token": bound.nats_per_token,
        "standard_error": bound.standard_error,
        "perplexity_bound": float(np.exp(bound.nats_per_token)),
        "unigram_nats_per_token": unigram / num_tokens,
        "ratio_to_unigram": bound.nats_per_token / (unigram / num_tokens),
        "rows": num_rows,
        "tokens": num_tokens,
    }


class _Scorer:
    """One actor: the model and the data set, opened once."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.config: EvaluateConfig = settings["config"]
        self.num_rows: int = settings["num_rows"]
        self.device = training_device()
        dtype = resolve_precision("auto", self.device)
        self.model, _ = llada.load(fetch_folder(settings["model"]), device=self.device, dtype=dtype)
        self.dataset = TokenDataset(settings["data"], self.config.split)
        counts = load_unigram_counts(settings["data"])
        self.unigram = -np.log((counts + 1) / (counts + 1).sum())

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        ids = np.arange(block["start"], block["end"])
        rows = self.dataset.rows(ids)
        masked = self.config.document_mask and self.dataset.kind != "sft"
        # SFT rows are stored with their padding; only the answer proper is scored.
        real = rows.maskable & (np.arange(rows.tokens.shape[1]) < rows.lengths[:, None])
        nats = bound_samples(
            self.model,
            torch.from_numpy(rows.tokens).to(self.device),
            torch.from_numpy(real).to(self.device),
            torch.from_numpy(ids).to(self.device),
            num_rows=self.num_rows,
            num_samples=self.config.num_samples,
            mask_id=resolve_mask_id(self.model, None),
            segment_ids=torch.from_numpy(rows.segment_ids).to(self.device) if masked else None,
            seed=self.config.seed,
        )
        return {
            "nats": nats.tolist(),
            "tokens": real.sum(1).tolist(),
            "unigram_nats": float(self.unigram[rows.tokens[real]].sum()),
        }


def _samples(config: EvaluateConfig, model: str, output: str) -> list[dict[str, Any]]:
    network, tokenizer = llada.load(fetch_folder(model), device=training_device())
    if tokenizer is None:
        raise StageError(f"{model} has no tokenizer, which the task samples needs")
    samples = complete_texts(network, tokenizer, list(config.prompts), config.sampling, seed=config.seed)
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_bytes(join(output, "samples.jsonl"), lines.encode())
    return samples


def read_results(output: str) -> dict[str, Any]:
    """The results of a finished evaluation."""
    return json.loads(read_bytes(join(output, "results.json")))


if __name__ == "__main__":
    from pipelines.cli import main

    main(["evaluate", *sys.argv[1:]])
