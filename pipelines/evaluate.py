"""The command `evaluate`: a checkpoint's perplexity bound on held-out shards, and samples of its text.

    <output>/results.json      the figures, with every setting they were made with
             samples.jsonl     what it writes                  rows/  per-block figures (what a rerun skips)
             manifest.json     last

Blocks of rows go through a Ray Data actor pool, each actor with one copy of the model. The noise belongs to the row, so
the number of actors changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import torch

import llada
from llada.data.tokens.manifest import resolve_snapshot
from llada.data.tokens.shards import TokenDataset, load_unigram_counts
from llada.diffusion.likelihood import bound_samples, summarise_bound
from llada.errors import UserError
from llada.files import absolute, join, write_bytes
from llada.model.hf import read_config
from llada.model.predict import resolve_mask_id
from llada.sampling.config import SamplingConfig
from llada.sampling.text import TextCompletion, complete_texts
from llada.settings import check_limits, limited
from llada.training.parallel import resolve_precision, training_device
from pipelines.runners.actors import Block, map_blocks, require_checkpoint
from pipelines.stage.artifact import (
    Manifest,
    fetch_folder,
    read_manifest,
    require_same_tokenizer,
    storage_errors,
)
from pipelines.stage.cluster import ClusterConfig, connect
from pipelines.stage.command import Common, Flat, parse, run_command, run_stage
from pipelines.stage.lifecycle import begin_stage, finish_stage, folder_input
from pipelines.stage.tracking import Tracker

Task = Literal["perplexity", "samples"]


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and how exactly."""

    tasks: tuple[Task, ...] = ("perplexity", "samples")
    split: str = "validation"
    max_rows: int | None = limited(1024, low=0)
    """Rows of the split, from its start; None scores all."""
    num_samples: int = limited(4, low=1)
    """Masks per row."""
    rows_per_block: int = limited(64, low=1)
    document_mask: bool = True
    seed: int = 0
    prompts: tuple[str, ...] = ("",)
    """Completed by the task "samples"."""
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self) -> None:
        check_limits(self, "evaluate")


@dataclass(frozen=True)
class EvaluateArgs:
    """A checkpoint's perplexity bound and samples."""

    model: str
    """Checkpoint folder."""
    common: Annotated[Common, Flat]
    data: str | None = None
    """A prepared folder, for the perplexity bound."""
    config: Annotated[EvaluateConfig, Flat] = EvaluateConfig()


def main(argv: Sequence[str]) -> None:
    """`llada evaluate …`"""
    args = parse(EvaluateArgs, argv, "evaluate")
    manifest = run_stage("evaluate", evaluate, args.common, args.config, model=args.model, data=args.data)
    results = manifest["results"]
    for name, value in results.items():
        if name != "samples":
            print(f"{name:<24}{value:,.4f}" if isinstance(value, float) else f"{name:<24}{value:,}")
    for sample in results.get("samples", []):
        print(f"--- {sample['prompt']}\n{sample['text']}")


def evaluate(
    config: EvaluateConfig,
    *,
    model: str,
    data: str | None,
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> Manifest:
    """Evaluate the checkpoint folder `model`, by the prepared folder `data` for perplexity; the manifest.

    Raises UserError: no checkpoint; perplexity without data, or with data of another vocabulary.
    """
    if "perplexity" in config.tasks and data is None:
        raise UserError("the task perplexity needs --data, a prepared folder")
    model, output, data = absolute(model), absolute(output), data and resolve_snapshot(absolute(data))
    require_checkpoint(model)
    if data and "perplexity" in config.tasks:
        _check_fit(model, data)
    folder = begin_stage(
        "evaluate",
        output,
        config=asdict(config),
        inputs=[folder_input("model", model), *([folder_input("data", data)] if data else [])],
        tracker=tracker,
    )
    if folder.manifest is not None:
        return folder.manifest
    results: dict[str, Any] = {}
    with storage_errors(output), connect(cluster, join(output, "logs")):
        if "perplexity" in config.tasks:
            assert data is not None
            results |= _perplexity(config, model, data, output, cluster, progress)
        if "samples" in config.tasks:
            results["samples"] = _samples(config, model, output)
        write_bytes(join(output, "results.json"), (json.dumps(results, indent=2) + "\n").encode())
    counts = {name: value for name, value in results.items() if isinstance(value, int | float)}
    return finish_stage(
        folder, tracker, counts, kind="evaluation", artifacts=("results.json",), results=results
    )


def _check_fit(model: str, data: str) -> None:
    """Refuse data that this network cannot score, before any actor is started."""
    network, _ = read_config(fetch_folder(model))
    if network.causal:
        raise UserError(
            f"{model} is autoregressive: its held-out loss is exact and stands in its metrics.jsonl"
        )
    info = read_manifest(data).get("dataset", {})
    if info.get("vocab_size", 0) > network.vocab_size or info.get("mask_token_id") != network.mask_token_id:
        raise UserError(
            f"{data} ({info.get('vocab_size')} ids, mask {info.get('mask_token_id')}) does not fit {model} "
            f"({network.vocab_size} ids, mask {network.mask_token_id}): prepare it with the model's tokenizer"
        )
    require_same_tokenizer(model, data)


class RowBlock(Block):
    """Rows start .. end - 1 of the split."""

    start: int
    end: int


class RowScores(TypedDict):
    """What an actor makes of a block of n rows, as JSON."""

    nats: list[list[float]]
    """(num_samples, n): the bound's samples, summed over a row's tokens."""
    tokens: list[int]
    """(n,): tokens that were scored."""
    unigram_nats: float
    """Of all those tokens together, by their frequency in the training split."""


def _perplexity(
    config: EvaluateConfig, model: str, data: str, output: str, cluster: ClusterConfig, progress: bool
) -> dict[str, Any]:
    dataset = TokenDataset(data, config.split)
    num_rows = min(len(dataset), config.max_rows or len(dataset))
    if num_rows == 0:
        raise UserError(f"{data} has no rows in its split {config.split!r}")
    blocks: list[RowBlock] = [
        {"name": f"{start:010d}", "start": start, "end": min(start + config.rows_per_block, num_rows)}
        for start in range(0, num_rows, config.rows_per_block)
    ]
    samples, tokens, unigram = [], [], 0.0
    for scores in map_blocks(
        partial(_Scorer, config, model=model, data=data, num_rows=num_rows),
        blocks,
        output=join(output, "rows"),
        cluster=cluster,
        label="evaluate",
        progress=progress,
    ):
        samples.append(torch.tensor(scores["nats"], dtype=torch.float64))
        tokens.append(torch.tensor(scores["tokens"]))
        unigram += scores["unigram_nats"]
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

    def __init__(self, config: EvaluateConfig, *, model: str, data: str, num_rows: int) -> None:
        self.config, self.num_rows = config, num_rows
        self.device = training_device()
        dtype = resolve_precision("auto", self.device)
        self.model, _ = llada.load(fetch_folder(model), device=self.device, dtype=dtype)
        self.dataset = TokenDataset(data, config.split)
        counts = load_unigram_counts(data)
        # Nats of each id.
        self.unigram = -np.log((counts + 1) / (counts + 1).sum())

    def __call__(self, block: RowBlock) -> RowScores:
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


def _samples(config: EvaluateConfig, model: str, output: str) -> list[TextCompletion]:
    network, tokenizer = llada.load(fetch_folder(model), device=training_device())
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer, which the task samples needs")
    samples = complete_texts(network, tokenizer, list(config.prompts), config.sampling, seed=config.seed)
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_bytes(join(output, "samples.jsonl"), lines.encode())
    return samples


if __name__ == "__main__":
    run_command("evaluate")
