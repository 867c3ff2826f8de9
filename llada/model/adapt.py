"""An autoregressive network becomes the start of a masked-diffusion one: the same weights, seen from both sides, and a mask.

The mask token gets a row of the vocabulary that training has not touched, or a new one. Weight decay has driven rows without
use towards zero, and the RMS norms then blow their gradients up (LLaDA2.0, arXiv 2512.15745, on the mask's embedding): the
row is set to the mean of all plus noise of their spread, as long as a token's. (The report's own remedy, which leaves a row that
the source has as it is, is diffusion/embedding_noise.py.)
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llada.model.initial import Rows
from llada.model.transformer import ModelConfig
from llada.settings import require

# A vocabulary that grows does so to a multiple of this: matrix products of odd widths are slow on GPUs.
ROWS_MULTIPLE = 64
# Rows whose mean and spread are summed at once.
_CHUNK = 8192


def diffusion_start(
    source: ModelConfig,
    mask_token_id: int,
    *,
    vocab_size: int = 0,
    block_length: int | None = None,
    shift: bool = False,
) -> ModelConfig:
    """The network that starts from `source`: not causal, with this mask, and rows for it and for `vocab_size` tokens.

    With `shift`, and for as long as it is given causal attention, it predicts of a position what `source` does.
    """
    rows = max(source.vocab_size, vocab_size, mask_token_id + 1)
    if rows > source.vocab_size:
        rows = -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return replace(
        source,
        causal=False,
        block_length=block_length,
        shift=shift,
        vocab_size=rows,
        mask_token_id=mask_token_id,
    )


def start_state(
    state: Mapping[str, Rows], source: ModelConfig, start: ModelConfig, *, mask_noise: float, seed: int
) -> dict[str, Rows]:
    """The weights of `start` (see `diffusion_start`) from those of `source`, our parameter names -> tensors: of the embedding
    and of an untied head, the rows of new tokens are mean and noise, and the mask's where the source knows none.

    Args:
        mask_noise: how far such a row is from the mean of the source's, in their standard deviations of each column.
        seed: of the noise, which is a function of it, of the matrix and of the row.

    Raises UserError for a negative or no finite noise.
    """
    require(0 <= mask_noise < math.inf, f"mask_noise must be a number from 0 on, not {mask_noise}")
    fresh = set(range(source.vocab_size, start.vocab_size))
    if source.causal and source.mask_token_id is None and start.mask_token_id is not None:
        fresh.add(start.mask_token_id)
    adapted = dict(state)
    for name in ("embed.weight", "lm_head.weight"):
        if name in state and fresh:
            adapted[name] = FreshRows(
                state[name], source.vocab_size, start.vocab_size, fresh, mask_noise, f"{seed}/{name}"
            )
    return adapted


class FreshRows:
    """A matrix (V, D) of which some rows are not those of `matrix` (U ≤ V, D), but its mean and noise."""

    def __init__(
        self, matrix: Rows, num_old: int, num_rows: int, fresh: set[int], noise: float, key: str
    ) -> None:
        self._matrix, self._num_old, self._num_rows = matrix, num_old, num_rows
        self._fresh, self._noise, self._key = fresh, noise, key

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self._num_rows)
        # At least one, which tells width and dtype.
        old = self._matrix[min(start, self._num_old - 1) : max(min(stop, self._num_old), 1)]
        num_old = max(0, min(stop, self._num_old) - start)
        taken = old.new_empty(stop - start, old.shape[1])
        taken[:num_old] = old[:num_old]
        for row in self._fresh & set(range(start, stop)):
            taken[row - start] = self._draw(row).to(taken.dtype)
        return taken

    def _draw(self, row: int) -> Tensor:
        mean, std = self._moments
        # The CPU's generator ignores the upper half of a 64-bit seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._key}/{row}".encode()))
        return mean + self._noise * std * torch.randn(len(mean), generator=generator, dtype=torch.float64)

    @functools.cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each column, (D,) float64 each, over the rows that are kept."""
        total = squares = torch.zeros((), dtype=torch.float64)
        count = 0
        for start in range(0, self._num_old, _CHUNK):
            stop = min(start + _CHUNK, self._num_old)
            kept = torch.tensor([row not in self._fresh for row in range(start, stop)])
            part = self._matrix[start:stop][kept].double()
            total, squares, count = total + part.sum(0), squares + part.square().sum(0), count + len(part)
        mean = total / count
        return mean, (squares / count - mean.square()).clamp(min=0).sqrt()
