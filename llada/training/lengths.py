"""Contexts shorter than a row: what a model has only ever seen filled to the last token, it cannot write shorter."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llada.diffusion.batch import Batch
from llada.diffusion.noise import row_keys, stream_key, uniforms, wide_uniforms
from llada.diffusion.objective import ObjectiveConfig


def vary_lengths(batch: Batch, config: ObjectiveConfig, seed: int) -> Batch:
    """The rows of a step with what `config` wants of random lengths and splits; any worker decides the same."""
    if config.random_length:
        length = random_length(batch.tokens.shape[1], config.random_length, seed, batch.step)
        segments = batch.segment_ids
        batch = replace(
            batch,
            tokens=batch.tokens[:, :length],
            segment_ids=None if segments is None else segments[:, :length],
            maskable=batch.maskable[:, :length],
        )
    if config.random_split:
        batch = replace(batch, segment_ids=split_rows(batch, config.random_split, seed))
    return batch


def random_length(length: int, share: float, seed: int, step: int) -> int:
    """LLaDA's random length: with probability `share` a whole step is cut to U{1 … length}."""
    draw = uniforms(stream_key(seed, "random-length", step), torch.arange(2))
    return int(draw[1] * length) + 1 if float(draw[0]) < share else length


def split_rows(batch: Batch, share: float, seed: int) -> Tensor:
    """iLLaDA's random split (arXiv 2606.25331): with probability `share` a row of L tokens becomes two, the first of
    U{1 … L − 1}, by the row and its epoch. (b, L) segment ids, none of which stands on both sides of a split."""
    b, L = batch.tokens.shape
    keys = torch.empty_like(batch.sample_ids)
    for epoch in batch.epochs.unique().tolist():
        here = batch.epochs == epoch
        keys[here] = row_keys(stream_key(seed, "random-split", epoch), batch.sample_ids[here])
    draw = wide_uniforms(keys, 2)
    first = (draw[:, 1] * (L - 1)).long() + 1
    first[draw[:, 0] >= share] = L
    segments = torch.zeros(b, L, dtype=torch.int32) if batch.segment_ids is None else batch.segment_ids
    is_behind = (torch.arange(L) >= first[:, None]) & (segments >= 0)  # padding keeps its -1
    return torch.where(is_behind, segments + L, segments)
