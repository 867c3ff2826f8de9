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
from typing import cast

import torch
from torch import Tensor

from llada.model.predict import Model
from llada.model.transformer import Block, Transformer
from llada.sampling.cache import KeyValues


@dataclass(frozen=True, slots=True)
class Fed:
    """Some tokens of a row that are fed to the network, and what of the row they see."""

    count: int
    begin: int
    """Where the first of them stands, counted from the row's first token."""
    seen: int
    """How many tokens the row has, from its first one on, that may be seen."""
    store: KeyValues | None
    """Where those that are not fed are kept, and the keys and values of these go."""

    @property
    def shape(self) -> tuple[bool, int, int]:
        """Rows of equal shapes may run together: is all of the row fed, how many tokens, how many are seen."""
        return self.count == self.seen, self.count, self.seen


def packed_forward(
    model: Model, rows: Sequence[Fed], tokens: Tensor, positions: Tensor, logits_at: Tensor
) -> Tensor:
    """Logits (N, V).

    Args:
        rows: sorted by shape.
        tokens: (T,) int64, row after row.
        positions: (T,) where each stands, counted from its row's first token.
        logits_at: (N,) indices into (T,).
    """
    device = cast(Transformer, model).embed.weight.device
    return model(
        tokens.to(device, non_blocking=True),
        positions=positions.to(device, non_blocking=True),
        layer_step=_Attention(rows).layer_step,
        logits_at=logits_at.to(device, non_blocking=True),
    )


class _Attention:
    """Who attends to whom among tokens (T,) laid end to end, rows of equal shapes side by side."""

    def __init__(self, rows: Sequence[Fed]) -> None:
        self.groups: list[tuple[int, list[Fed]]] = []
        at = 0
        for _, same in groupby(rows, key=lambda row: row.shape):
            group = list(same)
            self.groups.append((at, group))
            at += sum(row.count for row in group)

    def layer_step(self, number: int, block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return block(x, cos, sin, attend=partial(self._attend, number, block))

    def _attend(self, number: int, block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = []
        for at, group in self.groups:
            is_whole, n, _ = group[0].shape
            part = slice(at, at + n * len(group))
            queries, keys, values = (x[part].unflatten(0, (len(group), n)) for x in (q, k, v))
            for row, own_keys, own_values in zip(group, keys, values, strict=True):
                if row.store is not None:
                    row.store.put(number, row.begin, own_keys, own_values)
            if is_whole:
                seen.append(block.attention(queries, keys, values, None).flatten(0, 1))
                continue
            for row, own_queries in zip(group, queries, strict=True):
                assert row.store is not None
                own_keys, own_values = row.store.seen(number, row.seen)
                seen.append(block.attention(own_queries[None], own_keys[None], own_values[None], None)[0])
        return torch.cat(seen) if len(seen) > 1 else seen[0]
