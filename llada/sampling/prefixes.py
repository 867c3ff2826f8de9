"""A prompt's beginning that many rows share, run once through the first layers for all of them (BiCache, arXiv 2606.07571).

What a prompt becomes depends on the text behind it, little in the first layers and more in each further one: with all
layers shared, quality collapses; the layers that are not shared run for each row. BiCache takes over what another
request left. Here a prefix is run with nothing but masks behind it, as many as a row is to write, so that what a row
gets is a function of the row alone, whoever stands beside it or came before.

Shape legend: p tokens of a prefix, K key/value heads, E head width, D model width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from llada.model.predict import Model
from llada.model.transformer import Block


@dataclass(frozen=True)
class Prefix:
    """The first tokens of a row after the first layers."""

    layers: list[tuple[Tensor, Tensor]]
    """Keys and values, each (p, K, E), of the layers that are shared."""
    stream: Tensor
    """(p, D): behind the last of them."""

    @property
    def depth(self) -> int:
        """How many layers are shared, from the first."""
        return len(self.layers)

    @property
    def length(self) -> int:
        return len(self.stream)

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.stream, *(t for layer in self.layers for t in layer)))


class PrefixStore:
    """The prefixes of one network that were used last, as many as fit into `max_bytes`. Not for several threads."""

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._prefixes: OrderedDict[tuple[int, int, bytes], Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prefixes)

    def get(self, model: Model, ids: Tensor, length: int, depth: int) -> tuple[Prefix, int]:
        """The first `length` of ids (n,), what stands behind them included, after `depth` layers; and how many tokens had to
        run through them, n or 0."""
        key = depth, length, ids.numpy().tobytes()
        prefix = self._prefixes.get(key)
        if prefix is not None:
            self._prefixes.move_to_end(key)
            return prefix, 0
        prefix = run_prefix(model, ids, length, depth)
        if prefix.num_bytes <= self.max_bytes:
            self._prefixes[key] = prefix
            self.num_bytes += prefix.num_bytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._prefixes.popitem(last=False)[1].num_bytes
        return prefix, len(ids)


@torch.no_grad()
def run_prefix(model: Model, ids: Tensor, length: int, depth: int) -> Prefix:
    """The tokens (n,), which see each other and nothing else, through the first `depth` ≥ 1 layers; of them the first."""
    layers: list[tuple[Tensor, Tensor]] = []
    stream = torch.empty(0)

    def step(number: int, block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        nonlocal stream

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layers.append((k[:length].clone(), v[:length].clone()))
            return block.attention(q[None], k[None], v[None], None)[0]

        if number < depth:
            x = stream = block(x, cos, sin, attend=attend)
        return x

    device = model.embed.weight.device  # type: ignore[attr-defined]
    none = torch.empty(0, dtype=torch.int64, device=device)
    positions = torch.arange(len(ids), device=device)
    model(ids.to(device), positions=positions, layer_step=step, logits_at=none)
    return Prefix(layers, stream[:length].clone())
