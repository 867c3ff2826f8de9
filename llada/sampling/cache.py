"""Which tokens a forward feeds to the network, and what is kept of earlier ones in place of the others.

    cache       knobs                               source                   fed between whole forwards
    prefix      refresh_every                       Fast-dLLM, 2505.22618    the block and all behind it
    dual        refresh_every                       Fast-dLLM                the block
    vicinity    refresh_every, vicinity             dInfer, 2510.08666       the block and its neighbours
    interval    prompt_interval, refresh_share,     dLLM-Cache, 2506.06295   all, of which the layers run a part
                response_interval
    any, none   suffix_window                       Streaming-dLLM           so many tokens behind the block at most
    any, none   shared_depth, shared_prefix         BiCache, 2606.07571      a prompt's beginning once for all rows
                                                                             (prefixes.py)

(Sources by their arXiv numbers.) `suffix_window=0` feeds nothing behind the block: the canvas grows block by block
until the text ends, as iLLaDA's does.

A bidirectional network has no exact cache: every token sees every other, so that each commit changes all of them. Nearly
all change little from one forward to the next. A mode says which columns are fed, and the others are seen as they were,
by their keys and values; with `refresh_every=1` all are, which is then, tensor for tensor, the forward without a cache. A
mode is a function and a row of `CACHES`. What it says depends on where the row stands and on nothing that happened to
it: a forward may be run again, but for one that looks for the values that have turned the most ("interval"), since it
keeps the new ones.

A block-causal network needs no mode: what it has finished is kept exactly, always (blocks.py).

"interval" feeds everything, and each layer but the first runs a part of it: the prompt and the response each at an
interval of their own, and in between the tokens of the response whose values have turned the most. The others go on with
what the layer added to them last. Its intervals count a row's forwards through all blocks, as upstream's; a guided row's
second copy is kept as the first, where upstream keeps the difference of the two.

Shape legend: n columns of a row, K key/value heads, E head width, D model width.
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
    """What one row keeps of its columns in all layers, made as it comes first: keys and values; and what the layers
    added to the stream, where a mode carries that on."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._added: dict[int, Tensor] = {}

    def put(self, layer: int, columns: slice | Tensor, keys: Tensor, values: Tensor) -> None:
        """Those of the columns (n,), each (n, K, E)."""
        if layer == len(self._layers):
            shape = (self._length, *keys.shape[1:])
            self._layers.append((keys.new_empty(shape), values.new_empty(shape)))
        for kept, new in zip(self._layers[layer], (keys, values), strict=True):
            kept[columns] = new

    def seen(self, layer: int, columns: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each (columns, K, E), of the first columns; writing to them changes what is kept."""
        keys, values = self._layers[layer]
        return keys[:columns], values[:columns]

    def put_added(self, layer: int, columns: Tensor, added: Tensor) -> None:
        """What the layer added to the columns (n,): (n, D)."""
        if layer not in self._added:
            self._added[layer] = added.new_empty(self._length, added.shape[1])
        self._added[layer][columns] = added

    def added(self, layer: int) -> Tensor:
        """(columns, D)."""
        return self._added[layer]

    @staticmethod
    def num_bytes(config: ModelConfig, length: int, itemsize: int, *, with_added: bool = False) -> int:
        """What a row of this length takes in the end."""
        width = 2 * config.num_layers * config.kv_heads * config.head_dim
        if with_added:
            width += (config.num_layers - 1) * config.d_model
        return width * length * itemsize


@dataclass
class RowCache:
    """What one row keeps: its keys and values, with guidance also those of the copy without a prompt."""

    stores: list[KeyValues] = field(default_factory=list)
    end: int = 0
    """The column behind the last one that was ever fed."""
    settled: int = 0
    """Of a block-causal network: so many of the row's first columns are kept as they will always be."""

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
    response: int
    """The first column that was not given."""
    step: int
    """Forwards of the row in this block so far."""
    forwards: int
    """Of the row so far."""
    config: SamplingConfig


class Refresh(NamedTuple):
    """Of a row that is fed as a whole, what the layers behind the first one run; the first one runs everything."""

    response: int
    """Where the response begins, counted from the row's first token."""
    prompt: bool
    """Does the prompt run?"""
    tokens: int
    """How many tokens of the response run: those whose values have turned the most."""


@dataclass(frozen=True)
class CacheMode:
    """`feed` returns the columns to feed when not the whole row is: at a new block all are, and at each `refresh_every`-th
    forward of a block. With `refresh` all are always fed, and it says what runs once all have run."""

    feed: Callable[[View], Stretch] = lambda view: view.row
    refresh: Callable[[View], Refresh] | None = None
    warm_up: int = 0
    """So many first forwards of a row feed all of it."""
    heeds: tuple[str, ...] = ("refresh_every",)
    """Which of the settings that only some modes heed it does."""


def _vicinity(view: View) -> Stretch:
    width = view.config.vicinity
    return Stretch(max(view.row.begin, view.block.begin - width), min(view.row.end, view.block.end + width))


def _by_intervals(view: View) -> Refresh:
    config, size = view.config, view.row.end - view.response
    is_due = view.forwards % config.response_interval == 0
    return Refresh(
        view.response - view.row.begin,
        view.forwards % config.prompt_interval == 0,
        size if is_due else int(size * config.refresh_share),
    )


_INTERVALS = ("prompt_interval", "response_interval", "refresh_share")
_CACHES = {
    # Fast-dLLM (arXiv 2505.22618): the block and everything behind it; or the block alone.
    "prefix": CacheMode(lambda view: Stretch(view.block.begin, view.row.end)),
    "dual": CacheMode(lambda view: view.block),
    # dInfer (arXiv 2510.08666, §4.2): the block and its neighbours, after some whole forwards.
    "vicinity": CacheMode(_vicinity, warm_up=4, heeds=("refresh_every", "vicinity")),
    "interval": CacheMode(refresh=_by_intervals, heeds=_INTERVALS),
}
OF_SOME_CACHES = ("refresh_every", "vicinity", *_INTERVALS)
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


def row_bytes(sampling: SamplingConfig, model: ModelConfig, length: int, itemsize: int) -> int:
    """What a row of this length with these settings keeps in the end, with `itemsize` bytes a number."""
    mode, copies = find_cache(sampling), 1 + (sampling.cfg_scale != 0)
    if model.block_length is not None:
        return copies * KeyValues.num_bytes(model, length, itemsize)
    if mode is None:
        return KeyValues.num_bytes(model, length, itemsize) * (sampling.shared_depth > 0)
    return copies * KeyValues.num_bytes(model, length, itemsize, with_added=mode.refresh is not None)


def choose_columns(view: View, cache: RowCache) -> tuple[Stretch, Refresh | None]:
    """The columns to feed at this forward, and what of them runs; None: all."""
    config = view.config
    if config.cache is None:
        return view.row, None
    mode, every = CACHES[config.cache], config.refresh_every
    if mode.refresh is not None:
        if cache.end < view.row.end:
            return view.row, Refresh(view.response - view.row.begin, True, view.row.end - view.response)
        return view.row, mode.refresh(view)
    is_due = view.step == 0 or (every is not None and view.step % every == 0)
    if is_due or view.forwards < mode.warm_up:
        return view.row, None
    return mode.feed(view), None
