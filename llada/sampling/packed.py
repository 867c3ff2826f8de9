"""One forward for rows of any lengths, laid end to end: no padding is fed, and no row sees another.

What is linear in the tokens runs over all of them at once; attention runs row by row, rows of the same shape together, so
that a row's numbers are those of the row alone up to the rounding of the matrix products.

Shape legend: R rows, T tokens of all rows, n fed tokens of a row, H heads, K key/value heads, E head width, N positions that
want logits, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from llada.model.attention import stretch_bias
from llada.model.predict import Model, device_of, network_block
from llada.model.transformer import Block
from llada.sampling.cache import KeyValues


@dataclass(frozen=True)
class Fed:
    """Some tokens of a row that are fed to the network, and what of the row they see."""

    tokens: Tensor
    """(n,) int64."""
    begin: int
    """Where the first of them stands, counted from the row's first token."""
    seen: int
    """How many tokens the row has, from its first one on, that may be seen."""
    store: KeyValues | None
    """Where those that are not fed are kept, and the keys and values of these go."""

    @property
    def shape(self) -> tuple[bool, int, int]:
        """Rows of equal shapes may run together: is all of the row fed, how many tokens, how many are seen."""
        return len(self.tokens) == self.seen, len(self.tokens), self.seen


def packed_forward(model: Model, rows: Sequence[tuple[Fed, Tensor]]) -> Tensor:
    """Logits (N, V), row after row, at the wanted places: indices (N of the row,) into the row's fed tokens."""
    device = device_of(model) or torch.device("cpu")
    order = sorted(range(len(rows)), key=lambda r: rows[r][0].shape)
    in_order = [rows[r][0] for r in order]
    attention = _Attention(in_order, network_block(model), device)
    begins = dict(zip(order, attention.begins, strict=True))
    tokens = torch.cat([fed.tokens for fed in in_order])
    positions = torch.cat([torch.arange(fed.begin, fed.begin + len(fed.tokens)) for fed in in_order])
    logits_at = torch.cat([wanted + begins[r] for r, (_, wanted) in enumerate(rows)])
    return model(
        tokens.to(device, non_blocking=True),
        positions=positions.to(device, non_blocking=True),
        layer_step=attention.layer_step,
        logits_at=logits_at.to(device, non_blocking=True),
    )


class _Attention:
    """Who attends to whom among tokens (T,) laid end to end, rows of equal shapes side by side."""

    def __init__(self, rows: Sequence[Fed], block_length: int | None, device: torch.device) -> None:
        self.begins: list[int] = []
        self.groups: list[tuple[int, list[Fed]]] = []
        # Of a block-causal network, whose fed tokens are the last of those seen, the mask of each group.
        self.masks: list[Tensor | None] = []
        at = 0
        for _, same in groupby(rows, key=lambda row: row.shape):
            group = list(same)
            self.groups.append((at, group))
            _, n, seen_tokens = group[0].shape
            mask = None if block_length is None else stretch_bias(seen_tokens - n, seen_tokens, block_length)
            self.masks.append(None if mask is None else mask.to(device))
            for row in group:
                self.begins.append(at)
                at += len(row.tokens)

    def layer_step(self, number: int, block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return block(x, cos, sin, attend=partial(self._attend, number, block))

    def _attend(self, number: int, block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = []
        for (at, group), mask in zip(self.groups, self.masks, strict=True):
            is_whole, n, _ = group[0].shape
            part = slice(at, at + n * len(group))
            queries, keys, values = (x[part].unflatten(0, (len(group), n)) for x in (q, k, v))
            for row, own_keys, own_values in zip(group, keys, values, strict=True):
                if row.store is not None:
                    row.store.put(number, row.begin, own_keys, own_values)
            if is_whole:
                seen.append(block.attention(queries, keys, values, mask).flatten(0, 1))
                continue
            for row, own_queries in zip(group, queries, strict=True):
                assert row.store is not None
                own_keys, own_values = row.store.seen(number, row.seen)
                seen.append(block.attention(own_queries[None], own_keys[None], own_values[None], mask)[0])
        return torch.cat(seen) if len(seen) > 1 else seen[0]
