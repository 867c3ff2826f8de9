"""The perplexity bound on the rows of a prepared folder, beside the unigram baseline.

The noise belongs to the row, so neither the size of a block nor who runs it changes a figure.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TypedDict

import numpy as np
import torch

from llada.data.tokens.shards import TokenDataset, load_unigram_counts
from llada.diffusion.likelihood import bound_samples, summarise_bound
from llada.errors import UserError
from llada.evals.evaluation import Block, EvaluateConfig, Evaluation, Figures, OpenModel
from llada.model.predict import device_of, resolve_mask_id

FED_TOKENS = 1 << 15
"""Of one forward, at the most, however many rows a block has: an 8B network needs about 4 GB for them beside its weights."""


class RowBlock(Block):
    """Rows start .. end - 1 of the split."""

    start: int
    end: int


class RowScores(TypedDict):
    """What becomes of a block of n rows, as JSON."""

    nats: list[list[float]]
    """(num_samples, n): the bound's samples, summed over a row's tokens."""
    tokens: list[int]
    """(n,): tokens that were scored."""
    unigram_nats: float
    """Of all those tokens together, by their frequency in the training split."""


def measure_perplexity(evaluation: Evaluation) -> Figures:
    """Nats per token with their standard error, where there is one, the perplexity that they bound, and the unigram baseline's nats.

    Raises UserError when the split has no rows.
    """
    config, data = evaluation.config, evaluation.require_data()
    dataset = TokenDataset(data, config.split)
    num_rows = min(len(dataset), config.max_rows or len(dataset))
    if num_rows == 0:
        raise UserError(f"{data} has no rows in its split {config.split!r}")
    blocks: list[RowBlock] = [
        {"name": f"{start:010d}", "start": start, "end": min(start + config.rows_per_block, num_rows)}
        for start in range(0, num_rows, config.rows_per_block)
    ]
    build = partial(RowScorer, evaluation.open_model, config, data, num_rows)
    samples, tokens, unigram = [], [], 0.0
    for scores in evaluation.map_blocks(build, blocks, folder="rows"):
        samples.append(torch.tensor(scores["nats"], dtype=torch.float64))
        tokens.append(torch.tensor(scores["tokens"]))
        unigram += scores["unigram_nats"]
    bound = summarise_bound(torch.cat(samples, dim=1), torch.cat(tokens))
    num_tokens = int(torch.cat(tokens).sum())
    return {
        "nats_per_token": bound.nats_per_token,
        # Of a single row with a single sample there is none.
        **({} if math.isnan(bound.standard_error) else {"standard_error": bound.standard_error}),
        "perplexity_bound": float(np.exp(bound.nats_per_token)),
        "unigram_nats_per_token": unigram / num_tokens,
        "ratio_to_unigram": bound.nats_per_token / (unigram / num_tokens),
        "rows": num_rows,
        "tokens": num_tokens,
    }


class RowScorer:
    """Scores blocks of rows; the model and the data set are opened once."""

    def __init__(
        self,
        open_model: OpenModel,
        config: EvaluateConfig,
        data: str,
        num_rows: int,
    ) -> None:
        self.config, self.num_rows = config, num_rows
        self.model, _ = open_model(fast=True)
        self.dataset = TokenDataset(data, config.split)
        counts = load_unigram_counts(data)
        # Nats of each id, add-one smoothed.
        self.unigram = -np.log((counts + 1) / (counts + 1).sum())

    def __call__(self, block: RowBlock) -> RowScores:
        ids = np.arange(block["start"], block["end"])
        rows, device = self.dataset.rows(ids), device_of(self.model)
        masked = self.config.document_mask and self.dataset.kind != "sft"
        # SFT rows are stored with their padding; only the answer proper is scored.
        real = rows.maskable & (np.arange(rows.tokens.shape[1]) < rows.lengths[:, None])
        tokens, maskable = torch.from_numpy(rows.tokens), torch.from_numpy(real)
        segments = torch.from_numpy(rows.segment_ids) if masked else None
        nats = [
            bound_samples(
                self.model,
                tokens[some].to(device),
                maskable[some].to(device),
                torch.from_numpy(ids)[some].to(device),
                num_rows=self.num_rows,
                num_samples=self.config.num_samples,
                mask_id=resolve_mask_id(self.model, None),
                segment_ids=None if segments is None else segments[some].to(device),
                seed=self.config.seed,
            )
            for some in torch.arange(len(ids)).split(max(1, FED_TOKENS // tokens.shape[1]))
        ]
        return {
            "nats": torch.cat(nats, dim=1).tolist(),
            "tokens": real.sum(1).tolist(),
            "unigram_nats": float(self.unigram[rows.tokens[real]].sum()),
        }
