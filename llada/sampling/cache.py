"""Which tokens a forward feeds to the network, and what is kept of earlier ones in place of the others.

A bidirectional network has no exact cache: every token sees every other, so that each commit changes all of them. Nearly all
change little from one forward to the next. A mode says which columns are fed, and the others are seen as they were, by their
keys and values; with `refresh_every=1` all are, which is then, tensor for tensor, the forward without a cache. A mode is a
function and a row of `CACHES`. What it says depends on where the row stands and on nothing that happened to it: a forward
may be run again.

Shape legend: n columns of a row, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from llada.model.transformer import ModelConfig
from llada.registry import Registry
from llada.settings import require

if TYPE_CHECKING:
    from llada.sampling.config import SamplingConfig


class KeyValues:
    """The keys and values of one row's columns in all layers, made as they come first."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._layers: list[tuple[Tensor, Tensor]] = []

    def put(self, layer: int, begin: int, keys: Tensor, values: Tensor) -> None:
        """Those of the columns from `begin` on, each (n, K, E)."""
        if layer == len(self._layers):
            shape = (self._length, *keys.shape[1:])
            self._layers.append((keys.new_empty(shape), values.new_empty(shape)))
        for kept, new in zip(self._layers[layer], (keys, values), strict=True):
            kept[begin : begin + len(new)] = new

    def seen(self, layer: int, columns: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each (columns, K, E), of the first columns."""
        keys, values = self._layers[layer]
        return keys[:columns], values[:columns]

    @staticmethod
    def num_bytes(config: ModelConfig, length: int, itemsize: int) -> int:
        """What a row of this length takes in the end."""
        return 2 * config.num_layers * length * config.kv_heads * config.head_dim * itemsize


@dataclass
class RowCache:
    """What one row keeps: its keys and values, with guidance also those of the copy without a prompt."""

    stores: list[KeyValues] = field(default_factory=list)
    end: int = 0
    """The column behind the last one that was ever fed."""

    def stores_for(self, length: int, copies: int) -> list[KeyValues]:
        """One store for each copy of the row, made when they are wanted first."""
        while len(self.stores) < copies:
            self.stores.append(KeyValues(length))
        return self.stores


class Stretch(NamedTuple):
    """Columns [begin, end) of a row."""

    begin: int
    end: int


class View(NamedTuple):
    """Where a row stands, in columns: what a mode may look at."""

    row: Stretch
    """All that may be fed."""
    block: Stretch
    """The block that it works on."""
    step: int
    """Forwards of the row in this block so far."""
    forwards: int
    """Of the row so far."""
    config: SamplingConfig


@dataclass(frozen=True)
class CacheMode:
    """`feed` returns the columns to feed when not the whole row is: at a new block all are, and at each `refresh_every`-th
    forward of a block."""

    feed: Callable[[View], Stretch]
    warm_up: int = 0
    """So many first forwards of a row feed all of it."""
    heeds: tuple[str, ...] = ("refresh_every",)
    """Which of the settings that only some modes heed it does."""


def _vicinity(view: View) -> Stretch:
    width = view.config.vicinity
    return Stretch(max(view.row.begin, view.block.begin - width), min(view.row.end, view.block.end + width))


_CACHES = {
    # Fast-dLLM (arXiv 2505.22618): the block and everything behind it; or the block alone.
    "prefix": CacheMode(lambda view: Stretch(view.block.begin, view.row.end)),
    "dual": CacheMode(lambda view: view.block),
    # dInfer (arXiv 2510.08666, §4.2): the block and its neighbours, after some whole forwards.
    "vicinity": CacheMode(_vicinity, warm_up=4, heeds=("refresh_every", "vicinity")),
}
OF_SOME_CACHES = ("refresh_every", "vicinity")
CACHES: Registry[CacheMode] = Registry("cache", _CACHES)


def find_cache(config: SamplingConfig) -> CacheMode | None:
    """The mode that the settings ask for. Raises UserError for an unknown one, and for a setting that it would not heed."""
    mode = None if config.cache is None else CACHES.find(config.cache)
    heeded = mode.heeds if mode else ()
    for name in OF_SOME_CACHES:
        require(
            name in heeded or getattr(config, name) == type(config).__dataclass_fields__[name].default,
            f"sampling: {name}={getattr(config, name)!r} means nothing to cache={config.cache!r}: leave it out, or "
            "choose another cache",
        )
    return mode


def choose_columns(view: View, cache: RowCache) -> Stretch:
    """The columns to feed at this forward."""
    config = view.config
    if config.cache is None:
        return view.row
    mode, every = CACHES[config.cache], config.refresh_every
    is_due = view.step == 0 or (every is not None and view.step % every == 0)
    if is_due or view.forwards < mode.warm_up or cache.end < view.row.end:
        return view.row
    return mode.feed(view)
