"""Who attends to whom, defined once, and the attention under it.

`AttentionMask.sees` is the definition. On a CPU it becomes a dense boolean mask for torch's attention; on CUDA, where a dense
mask with grouped queries leaves only the kernel that writes all scores out (17 GB a tensor at 8192 positions), the tiles of
FlexAttention (arXiv 2412.05496). Without a mask torch's flash kernels run.

Blocks of a block-causal network are numbered from a row's first token, or from a document's where documents are packed.

Shape legend: B rows, L columns, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from llada.model.compilation import for_many_kinds

# What FlexAttention's kernels multiply is at least so wide.
MIN_TILE_WIDTH = 16

Sight = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether in row b query q sees key k, of the integers (b, head, q, k) in any shapes that broadcast."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionMask:
    """Who attends to whom in a forward, the same for all heads."""

    sees: Sight
    rows: int
    """B, or 1 where all rows are alike."""
    length: int
    """Queries, and keys, of a row."""
    device: torch.device

    @staticmethod
    def of(
        attention_mask: Tensor | None,
        segment_ids: Tensor | None,
        length: int,
        device: torch.device,
        *,
        causal: bool = False,
        lookahead: int | None = None,
        block_length: int | None = None,
        with_context: bool = False,
    ) -> AttentionMask | None:
        """The mask of these inputs, or None where torch's attention needs none: everybody sees all, or all before it.

        A query that would see nothing (padding before the first token) sees itself; in a row of padding alone, which has no
        such query otherwise, all see all.

        Args:
            attention_mask, segment_ids: (B, L), see `Transformer.forward`. A mask of ones counts as none on a CPU; elsewhere
                the answer would have to be waited for.
            lookahead: so many columns behind itself a query sees, no farther ones; None: all.
            block_length: of a block-causal network.
            with_context: the columns stand twice, noised and behind that as they are: 2L queries and keys. What is noised
                sees its own noised block and the earlier ones as they are (BD3-LM, arXiv 2503.09573, §3.1 and App. B.6).
        """
        attended = attention_mask
        if attended is not None and device.type == "cpu" and bool(attended.all()):
            attended = None
        blocks = None
        if block_length is not None and (with_context or block_length < length):
            blocks = block_numbers(attended, segment_ids, block_length, length, device)
        if attended is None and segment_ids is None and blocks is None and lookahead is None:
            return None
        last = None
        if causal or lookahead is not None:
            last = torch.arange(length, device=device) + (lookahead or 0)
        if attended is not None:
            attended = attended.bool()
            attended = attended | ~attended.any(1, keepdim=True)
        by_column = [attended, segment_ids, blocks]
        rows = max((len(values) for values in by_column if values is not None), default=1)
        sees = _sight(*(_of_columns(values, with_context) for values in by_column), last=last)
        if with_context:
            noised = torch.arange(2 * length, device=device) < length
            sees = _sight_of_context(sees, noised, _of_columns(blocks, with_context))
        if attended is not None and not (segment_ids is None and blocks is None and last is None):
            sees = _or_itself(sees)
        return AttentionMask(sees, rows, length * (2 if with_context else 1), device)

    def dense(self) -> Tensor:
        """(B or 1, 1, L or 1, L) bool: True where a query (row) sees a key (column)."""
        b = torch.arange(self.rows, device=self.device)[:, None, None, None]
        columns = torch.arange(self.length, device=self.device)[None, None]
        return self.sees(b, torch.zeros_like(b), columns[..., None], columns[..., None, :])

    def tiles(self) -> BlockMask:
        """For FlexAttention: which tiles nobody sees, and which are seen whole. Compiled on CUDA, where so no (L, L) tensor is
        made."""
        make = _compiled(create_block_mask) if self.device.type == "cuda" else create_block_mask
        return make(self.sees, self.rows, None, self.length, self.length, device=self.device)

    def for_kernel(self, head_dim: int) -> Tensor | BlockMask:
        """In the form that `masked_attention` runs on this device."""
        in_tiles = takes_tiles(self.device.type, head_dim, can_compile=has_compiler())
        return self.tiles() if in_tiles else self.dense()


def takes_tiles(device_type: str, head_dim: int, *, can_compile: bool) -> bool:
    """Does FlexAttention run what has a mask? On CPUs it has no backward, and without a compiler it writes all scores out."""
    return device_type == "cuda" and head_dim >= MIN_TILE_WIDTH and can_compile


@functools.cache
def has_compiler() -> bool:
    """Whether torch can compile for CUDA here: it needs triton, which needs a C compiler."""
    found = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
    found = found and importlib.util.find_spec("triton") is not None
    if not found and torch.cuda.is_available():
        log.warning(
            "no triton, or no C compiler (gcc, clang or $CC) for it: attention under a mask runs dense, in memory of the "
            "rows' length squared; install one"
        )
    return found


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, *, causal: bool
) -> Tensor:
    """Softmax attention (B, L, H, E) of q (B, L, H, E) over k and v (B, S, K, E), key heads repeated for H / K queries each.

    Args:
        mask: boolean, broadcast to (B, H, L, S), or tiles.
        causal: what None as mask means.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    is_grouped = k.shape[1] != q.shape[1]
    if isinstance(mask, BlockMask):
        kernel: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
        out = kernel(q, k, v, block_mask=mask, enable_gqa=is_grouped)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=is_grouped
        )
    return out.transpose(1, 2)


def _compiled(function: Callable) -> Any:
    """Once for all layers; in what is being compiled already, a part of it."""
    return function if torch.compiler.is_compiling() else _compile(function)


@functools.cache
def _compile(function: Callable) -> Any:
    return torch.compile(function, **for_many_kinds())


def _of_columns(values: Tensor | None, with_context: bool) -> Tensor | None:
    """What `sees` reads of each column, from (B or 1, L): (L,) where the rows are alike; twice with the context."""
    if values is None:
        return None
    values = torch.cat([values, values], dim=1) if with_context else values
    return values[0] if len(values) == 1 else values


def _at(values: Tensor, b: Tensor, column: Tensor) -> Tensor:
    return values[column] if values.dim() == 1 else values[b, column]


def _sight(
    attended: Tensor | None, segments: Tensor | None, blocks: Tensor | None, *, last: Tensor | None
) -> Sight:
    """A key is seen if it is attended to at all, of the query's segment, not of a later block, and not behind the query's
    `last` (L,)."""

    def sees(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen: Tensor | None = None
        if attended is not None:
            seen = _at(attended, b, k)
        if segments is not None:
            same = _at(segments, b, q) == _at(segments, b, k)
            seen = same if seen is None else seen & same
        if blocks is not None:
            reached = _at(blocks, b, k) <= _at(blocks, b, q)
            seen = reached if seen is None else seen & reached
        if last is not None:
            seen = k <= last[q] if seen is None else seen & (k <= last[q])
        assert seen is not None
        return seen

    return sees


def _sight_of_context(sees: Sight, noised: Tensor, blocks: Tensor | None) -> Sight:
    """The same among twice as many columns: what is noised sees its own block noised and the earlier ones clean, what is
    clean sees what is clean."""
    assert blocks is not None

    def sees_context(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        is_own = _at(blocks, b, q) == _at(blocks, b, k)
        right_copy = torch.where(noised[q], noised[k] == is_own, ~noised[k])
        return sees(b, head, q, k) & right_copy

    return sees_context


def _or_itself(sees: Sight) -> Sight:
    def sees_itself(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(b, head, q, k) | (q == k)

    return sees_itself


def row_positions(attention_mask: Tensor) -> Tensor:
    """(B, L) int64: columns counted from each row's first attended one, negative before it; of a row without any, from 0."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return columns - attention_mask.bool().long().argmax(1, keepdim=True)


def block_numbers(
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    block_length: int,
    length: int,
    device: torch.device,
) -> Tensor:
    """(B or 1, L) int64: the block of each column, counted from its row's first attended column, and within its segment,
    which is a run of columns, from that one's first."""
    columns = torch.arange(length, device=device)[None]
    positions = columns if attention_mask is None else row_positions(attention_mask)
    if segment_ids is not None:
        is_first = torch.zeros_like(segment_ids, dtype=torch.bool)
        is_first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        positions = torch.minimum(positions, columns - (is_first * columns).cummax(1).values)
    return positions.clamp(min=0) // block_length


def stretch_bias(begin: int, end: int, block_length: int) -> Tensor | None:
    """Boolean mask (end − begin, end) of the queries in [begin, end) of a block-causal row, whose keys are [0, end); None
    where they all stand in its last block, and see everything."""
    block = torch.arange(end) // block_length
    if begin >= end or block[begin] == block[-1]:
        return None
    return block[None, :] <= block[begin:, None]
