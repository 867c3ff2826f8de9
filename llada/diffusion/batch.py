"""Rows of a global batch, with what their noise and their share of the loss depend on: seed-free integers, no worker; and
what becomes of them, `MicroBatch`: all that a forward and its loss need, and nothing that a device would have to wait for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Some rows (b, one worker's or a micro-batch) of one step's global batch (G)."""

    tokens: Tensor
    """(b, L) int64."""
    segment_ids: Tensor | None
    """(b, L), None where every position may see every other."""
    maskable: Tensor
    """(b, L) bool, False on prompts and on padding that is not learned."""
    slots: Tensor
    """(b,) int64 places in the global batch."""
    epochs: Tensor
    """(b,) int64."""
    sample_ids: Tensor
    """(b,) int64 places in the data set."""
    step: int
    """0-based."""
    global_rows: int
    """G."""
    per_row: bool
    """SFT: each row counts alike, divided by its own answer length."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor replaced by function(tensor)."""
        mapped: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **mapped)

    def select(self, rows: slice | Tensor) -> Batch:
        """Some of the rows; they keep their slots and ids."""
        return self.map(lambda tensor: tensor[rows])

    def split(self, sizes: Sequence[int]) -> Iterator[Batch]:
        """Micro-batches of so many rows each, which are all of them."""
        for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            yield self.select(slice(end - size, end))

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


NOISE_BUCKETS = 10
"""Equal parts of [0, 1] by which the loss is told by the mask probability."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward is fed and what is asked of it: b rows of L, N positions."""

    tokens: Tensor
    """(b, L) int64: noised, mask tokens in place."""
    segment_ids: Tensor | None
    """(b, L), as in `Batch`."""
    context: Tensor | None
    """(b, L) int64: the clean tokens that a block-causal network reads beside the noised ones."""
    positions: Tensor
    """(N,) int64 into the b · L: where logits are wanted."""
    targets: Tensor
    """(N,) int64: the tokens to predict there."""
    scale: Tensor
    """(N,) float64: what each position's −log p counts, before the division by `objective_loss`' normalizer. 0 at those that
    only fill up."""
    excluded_id: int | None
    """Has no probability (MDLM's SUBS: the mask)."""
    lookahead: int | None = None
    """So many columns behind itself a token sees; None: all."""
    embedding_noise_keys: Tensor | None = None
    """(N,) int64, and `embedding_noise_std` (N,) float32, of the noise on the positions' embeddings (embedding_noise.py); None: none."""
    embedding_noise_std: Tensor | None = None
    noise: Tensor | None = None
    """(N,) int64 in [0, NOISE_BUCKETS): which part of [0, 1] the mask probability of each position's row or block lies in;
    NOISE_BUCKETS at those that only fill up. None where nothing is masked."""

    def map(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        """The same with every tensor replaced by function(tensor)."""
        mapped: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **mapped)
