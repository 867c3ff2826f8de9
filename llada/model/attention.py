"""Who attends to whom, as boolean masks: True where a query (row) may attend to a key (column).

Blocks of a block-causal network are numbered from a row's first token, or from a document's where documents are packed.

Shape legend: B rows, L columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_positions(attention_mask: Tensor) -> Tensor:
    """(B, L) int64: columns counted from each row's first attended one, negative before it; of a row without any, from 0."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return columns - attention_mask.bool().long().argmax(1, keepdim=True)


def attention_bias(
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    length: int,
    device: torch.device,
    *,
    causal: bool = False,
    block_length: int | None = None,
    with_context: bool = False,
) -> Tensor | None:
    """Boolean mask (B or 1, 1, L, L), or None where everything may be attended to.

    A mask of ones becomes None, so that the fast attention kernels stay available.

    Args:
        attention_mask, segment_ids: (B, L), see `Transformer.forward`.
        block_length: of a block-causal network.
        with_context: the columns stand twice, noised and behind that as they are: (B or 1, 1, 2L, 2L). What is noised sees
            its own noised block and the earlier ones as they are (BD3-LM, arXiv 2503.09573, §3.1 and App. B.6).
    """
    allowed: Tensor | None = None
    if attention_mask is not None and not bool(attention_mask.all()):
        allowed = attention_mask.bool()[:, None, None, :]
    if segment_ids is not None:
        same = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        allowed = same if allowed is None else allowed & same
    if block_length is not None and (with_context or block_length < length):
        block = block_numbers(attention_mask, segment_ids, block_length, length, device)
        query, key = block[:, None, :, None], block[:, None, None, :]
        own, earlier = query == key, key < query
        if allowed is not None:
            own, earlier = own & allowed, earlier & allowed
        allowed = own | earlier
        if with_context:
            noised, clean = [own, earlier], [torch.zeros_like(own), allowed]
            allowed = torch.cat([torch.cat(noised, dim=-1), torch.cat(clean, dim=-1)], dim=-2)
    elif causal and allowed is not None:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if allowed is not None and (causal or block_length is not None):
        # A padded query before the first real token would see no key at all: let it see itself instead of NaN.
        allowed = allowed | torch.eye(allowed.shape[-1], dtype=torch.bool, device=device)
    return allowed


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
