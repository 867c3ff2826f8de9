"""Items to shards: collects what is to be stored until it fills a shard, packs it into rows and writes them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from llada.data.tokens.manifest import ShardEntry
from llada.data.tokens.packing import RowLayout, answer_tokens
from llada.data.tokens.shards import write_shard


class ShardWriter:
    """The shards of one split, one after the other: <split>/<stem>.safetensors below `root`, `stem` with their number.

    Attributes: `counts` int64 (vocab_size,), how often each token is trained on; `seconds` of CPU time.
    """

    def __init__(
        self,
        root: str,
        split: str,
        stem: str,
        layout: RowLayout,
        rows_per_shard: int,
        vocab_size: int,
        source: str = "",
    ) -> None:
        self._root, self._split, self._stem, self._source = root, split, stem, source
        self._layout, self._capacity = layout, layout.capacity(rows_per_shard)
        self._waiting: list[Any] = []
        self._waiting_size = 0
        self._shards: list[ShardEntry] = []
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.seconds = 0.0

    def add(self, item: Any) -> None:
        """An item of the layout: a document's tokens, or an example."""
        self._waiting.append(item)
        self._waiting_size += self._layout.size(item)
        while self._waiting_size >= self._capacity:
            items, self._waiting = self._layout.take(self._waiting, self._capacity)
            self._write(items)
            self._waiting_size = sum(map(self._layout.size, self._waiting))

    def close(self) -> list[ShardEntry]:
        """Write what is left, the last row padded, and return all shards."""
        if self._waiting:
            self._write(self._waiting)
            self._waiting = []
        return self._shards

    def _write(self, items: list[Any]) -> None:
        begun = time.thread_time()
        rows = self._layout.rows(items)
        stem = self._stem.format(len(self._shards))
        self._shards.append(write_shard(self._root, self._split, stem, rows, self._source))
        self.counts += np.bincount(answer_tokens(rows), minlength=len(self.counts))
        self.seconds += time.thread_time() - begun
