"""One forward for rows of any lengths, laid end to end: no padding is fed, and no row sees another.

What is linear in the tokens runs over all of them at once; attention runs row by row, rows of the same shape together, so
that a row's numbers are those of the row alone up to the rounding of the matrix products. With `batch_invariant` products
have a fixed shape and rows attend singly: then they are those of the row alone, bit for bit. Of some rows a layer runs only
a part of the tokens; the others are carried on by what it added to them last, or, as they come from a prefix that rows
share, wait for the first layer that is not shared.

Shape legend: R rows, T tokens of all rows, t of them that run in a layer, n fed tokens of a row, H heads, K key/value heads,
E head width, D model width, N positions that want logits, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llada.model.attention import stretch_bias
from llada.model.predict import Model, network_block
from llada.model.transformer import Block, Transformer
from llada.sampling.cache import KeyValues, Refresh
from llada.sampling.prefixes import Prefix
from llada.sampling.rules import highest

# Cosines so near to each other are equal but for rounding, and the lower column counts as the more turned.
_ROUNDING = 16 * torch.finfo(torch.float32).eps
# Tokens in a product of fixed shape. A CPU computes what fills a chunk up, so fewer; a GPU reads all weights for each
# chunk, which takes about as long as 256 tokens' arithmetic (bf16: 1,000 TFLOP/s against 3.4 TB/s).
CHUNK = {"cpu": 64, "cuda": 256}
MANY, PART = 1024, 256  # more tokens than this go through a product in parts on a CPU, and each of so many


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
    refresh: Refresh | None = None
    """Which of them the layers run; None: all."""
    prefix: Prefix | None = None
    """What the first of the row's tokens are after the layers that they share with other rows, which do not run them."""

    @property
    def is_partial(self) -> bool:
        """Do some layers run a part of the tokens?"""
        return self.refresh is not None or self.prefix is not None

    def num_waiting(self, layer: int) -> int:
        """So many of the first fed tokens wait for a later layer."""
        if self.prefix is None or layer >= self.prefix.depth:
            return 0
        return max(0, self.prefix.length - self.begin)

    @property
    def shape(self) -> tuple[bool, bool, int, int]:
        """Rows of equal shapes may run together: is all of the row fed, how many tokens, how many are seen."""
        return self.is_partial, self.count == self.seen, self.count, self.seen

    def num_run(self, layers: int) -> int:
        """How many tokens run, as many as would make the same work in all layers, rounded up. Looking for the values that
        have turned the most is not counted."""
        if not self.is_partial:
            return self.count
        run, refresh = 0, self.refresh
        for layer in range(layers):
            waiting = self.num_waiting(layer)
            if refresh is None or layer == 0:
                run += self.count - waiting
            else:
                run += (refresh.response - waiting) * refresh.prompt + refresh.tokens
        return -(-run // layers)


def packed_forward(
    model: Model,
    rows: Sequence[Fed],
    tokens: Tensor,
    positions: Tensor,
    logits_at: Tensor,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """Logits (N, V).

    Args:
        rows: sorted by shape.
        tokens: (T,) int64, row after row.
        positions: (T,) where each stands, counted from its row's first token.
        logits_at: (N,) indices into (T,).
        batch_invariant: a row's logits are bit for bit those of the row alone, in any precision.
    """
    device = cast(Transformer, model).embed.weight.device
    layers = _Layers(rows, network_block(model), device, batch_invariant)
    return model(
        tokens.to(device, non_blocking=True),
        positions=positions.to(device, non_blocking=True),
        layer_step=layers.step,
        head_step=in_chunks if batch_invariant else None,
        logits_at=logits_at.to(device, non_blocking=True),
    )


def in_parts(function: Callable[..., Any], *tokens: Tensor) -> Any:
    """What `function` makes of tensors (T, …), one entry a token. Very many go in parts on a CPU, whose caches would not hold
    what stands between two products."""
    if tokens[0].is_cuda or len(tokens[0]) <= MANY:
        return function(*tokens)
    return _joined([function(*part) for part in zip(*(x.split(PART) for x in tokens), strict=True)])


def in_chunks(function: Callable[..., Any], *tokens: Tensor) -> Any:
    """The same, so many tokens at a time, the last chunk filled up with zeros. The shape of matrices chooses the kernel and the
    order of its sums: now it is one shape, whoever stands beside a token. At which row of it the token stands makes no
    difference to torch's kernels on a CPU; on another device tests/benchmarks/batch_invariance.py fails where it does."""
    count, size = len(tokens[0]), CHUNK["cuda" if tokens[0].is_cuda else "cpu"]
    filled = [F.pad(x, (*(0, 0) * (x.dim() - 1), 0, -count % size)) for x in tokens]
    joined = _joined([function(*chunk) for chunk in zip(*(x.split(size) for x in filled), strict=True)])
    return joined[:count] if isinstance(joined, Tensor) else tuple(some[:count] for some in joined)


def _joined(parts: list[Any]) -> Any:
    """One tensor, or a tuple of them, of those that are given for some of the tokens each."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(some) for some in zip(*parts, strict=True))


class _Layers:
    """Runs each layer on tokens (T,) laid end to end: first the rows that run as a whole, those of equal shapes side by
    side, then those that run in part."""

    def __init__(
        self, rows: Sequence[Fed], block_length: int | None, device: torch.device, batch_invariant: bool
    ) -> None:
        # How what is linear in the tokens runs.
        self.run = in_chunks if batch_invariant else in_parts
        self.groups: list[tuple[int, list[Fed]]] = []
        # Of a block-causal network, whose fed tokens are the last of those seen, the mask of each group.
        self.masks: list[Tensor | None] = []
        self.partial: list[tuple[int, Fed]] = []
        self.whole = at = 0
        for _, same in groupby(rows, key=id if batch_invariant else lambda row: row.shape):
            group = list(same)
            is_partial = group[0].is_partial
            n, seen = group[0].count, group[0].seen
            if is_partial:
                self.partial += [(at + place * n, row) for place, row in enumerate(group)]
            else:
                self.groups.append((at, group))
                mask = None if block_length is None else stretch_bias(seen - n, seen, block_length)
                self.masks.append(None if mask is None else mask.to(device))
            at += n * len(group)
            self.whole = self.whole if is_partial else at

    def step(self, number: int, block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.partial:
            return self._run(number, block, [], x, cos, sin)
        if number == 0:
            self._wait(x)
        after, runs = x.clone(), []
        for at, row in self.partial:
            waiting = row.num_waiting(number)
            if waiting and row.begin == 0:
                assert row.prefix is not None
                _store(row).put(number, slice(0, waiting), *row.prefix.layers[number])
            run = _choose(number, block, row, x[at : at + row.count])
            if len(run) < row.count - waiting:
                after[at + waiting : at + row.count] += _store(row).added(number)[waiting : row.count]
            runs.append(run)
        places = [at + run for (at, _), run in zip(self.partial, runs, strict=True)]
        running = torch.cat([torch.arange(self.whole, device=x.device), *places])
        if not len(running):
            return after
        before = x[running]
        out = self._run(number, block, runs, before, cos[running], sin[running])
        after[running] = out
        if number:
            added = (out - before)[self.whole :].split([len(run) for run in runs])
            for (_, row), run, own in zip(self.partial, runs, added, strict=True):
                if row.refresh is not None:
                    _store(row).put_added(number, run, own)
        return after

    def _run(
        self, number: int, block: Block, runs: Sequence[Tensor], x: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """The stream (t, D) of the tokens that run, behind the layer."""
        q, k, v = self.run(block.project, x, cos, sin)
        return self.run(block.mix, x, self._attend(number, block, runs, q, k, v))

    def _wait(self, x: Tensor) -> None:
        """Put what shared prefixes become where they stand in the stream x (T, D), in place."""
        for at, row in self.partial:
            if (waiting := row.num_waiting(0)) and row.prefix is not None:
                x[at : at + waiting] = row.prefix.stream[row.begin : row.begin + waiting]

    def _attend(
        self, number: int, block: Block, runs: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """(t, H, E) of the tokens that run; `runs` are those of the rows in part, each (n,) among the row's fed tokens."""
        seen = []
        for (at, group), mask in zip(self.groups, self.masks, strict=True):
            n, is_whole = group[0].count, group[0].count == group[0].seen
            part = slice(at, at + n * len(group))
            queries, keys, values = (x[part].unflatten(0, (len(group), n)) for x in (q, k, v))
            for row, own_keys, own_values in zip(group, keys, values, strict=True):
                if row.store is not None:
                    row.store.put(number, slice(row.begin, row.begin + n), own_keys, own_values)
            if is_whole:
                seen.append(block.attention(queries, keys, values, mask).flatten(0, 1))
                continue
            if q.is_cuda:  # one kernel is worth the copies
                seen.append(attend_alike(number, block, group, queries, mask).flatten(0, 1))
                continue
            for row, own_queries in zip(group, queries, strict=True):
                seen.append(attend_row(number, block, row, own_queries, mask))
        at = self.whole
        for (_, row), run in zip(self.partial, runs, strict=True):
            part = slice(at, at + len(run))
            at = part.stop
            _store(row).put(number, row.begin + run, k[part], v[part])
            if len(run):
                seen.append(attend_row(number, block, row, q[part]))
        return torch.cat(seen) if len(seen) > 1 else seen[0]


def attend_alike(
    number: int, block: Block, rows: Sequence[Fed], queries: Tensor, mask: Tensor | None = None
) -> Tensor:
    """`attend_row` for rows of equal shapes together: (R, n, H, E) from queries (R, n, H, E)."""
    kept = [_store(row).seen(number, row.seen) for row in rows]
    keys, values = (torch.stack(some) for some in zip(*kept, strict=True))
    return block.attention(queries, keys, values, mask)


def attend_row(number: int, block: Block, row: Fed, queries: Tensor, mask: Tensor | None = None) -> Tensor:
    """(n, H, E) from queries (n, H, E) over all that is kept of the row and may be seen."""
    keys, values = _store(row).seen(number, row.seen)
    return block.attention(queries[None], keys[None], values[None], mask)[0]


def _store(row: Fed) -> KeyValues:
    assert row.store is not None, "what is not fed, or does not run, has to be kept"
    return row.store


def _choose(number: int, block: Block, row: Fed, x: Tensor) -> Tensor:
    """Which of the row's fed tokens, whose stream is x (n, D), the layer runs, in order."""
    refresh, waiting = row.refresh, row.num_waiting(number)
    if refresh is None or number == 0:
        return torch.arange(waiting, row.count, device=x.device)
    prompt = torch.arange(waiting, refresh.response if refresh.prompt else waiting, device=x.device)
    size = row.count - refresh.response
    response = torch.arange(size, device=x.device)
    if refresh.tokens < size:
        response = response[: refresh.tokens]
        if refresh.tokens:
            response = _most_turned(number, block, row, x[refresh.response :], refresh)
    return torch.cat([prompt, refresh.response + response])


def _most_turned(number: int, block: Block, row: Fed, x: Tensor, refresh: Refresh) -> Tensor:
    """The tokens of the response, x (n, D), whose values point least to where they did (dLLM-Cache's V-verify, arXiv
    2506.06295 §3.2), in order. The new values of all are kept."""
    values = block.v_proj(block.attn_norm(x))
    kept = _store(row).seen(number, row.seen)[1][refresh.response :]
    cosine = F.cosine_similarity(values.double(), kept.flatten(1).double(), dim=1)
    kept.copy_(values.view_as(kept))
    count = torch.tensor([refresh.tokens], device=x.device)
    chosen = highest(-cosine[None], count, torch.full_like(cosine, _ROUNDING)[None])[0]
    return chosen.to(torch.int8).argsort(descending=True, stable=True)[: refresh.tokens]
