"""Items to shards: collects what is to be stored until it fills a shard, packs it into rows and writes them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llada.data.document import Document
from llada.data.outcomes import Report
from llada.data.tokens.manifest import ShardEntry
from llada.data.tokens.packing import RowLayout, answer_tokens
from llada.data.tokens.shards import write_shard
from llada.data.tokens.splits import SPLITS, split_of


@dataclass(frozen=True)
class Target:
    """Where shards go and how they are cut: <split>/<stem>.safetensors below `root`, `stem` with their number."""

    root: str
    stem: str
    layout: RowLayout
    rows_per_shard: int
    vocab_size: int
    validation_fraction: float = 0.0
    split_seed: int = 0
    source: str = ""


class Written(NamedTuple):
    """The shards of all splits, and how often each token is trained on in the train split: int64 (V,)."""

    shards: list[ShardEntry]
    unigrams: np.ndarray


def write(encoded: Iterable[tuple[Document, list[Any]]], target: Target, report: Report) -> Written:
    """Pack the items of documents into the rows of their splits and write them; the report learns how many."""
    writers = {split: ShardWriter(split, target) for split in SPLITS}
    documents = Counter[str]()
    for document, items in encoded:
        split = split_of(document, target.validation_fraction, target.split_seed)
        documents[split] += 1
        for item in items:
            writers[split].add(item)
    shards: list[ShardEntry] = []
    for split, writer in writers.items():
        own = writer.close()
        rows, tokens = sum(shard.rows for shard in own), sum(shard.tokens for shard in own)
        report.splits[split] = {"documents": documents[split], "rows": rows, "tokens": tokens}
        shards += own
    report.add_seconds("pack", sum(writer.seconds for writer in writers.values()))
    return Written(shards, writers["train"].counts)


class ShardWriter:
    """The shards of one split, one after the other.

    Attributes: `counts` int64 (V,), how often each token is trained on; `seconds` of CPU time.
    """

    def __init__(self, split: str, target: Target) -> None:
        self._split, self._target, self._layout = split, target, target.layout
        self._capacity = target.layout.capacity(target.rows_per_shard)
        self._waiting: list[Any] = []
        self._waiting_size = 0
        self._shards: list[ShardEntry] = []
        self.counts = np.zeros(target.vocab_size, dtype=np.int64)
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
        rows, target = self._layout.rows(items), self._target
        stem = target.stem.format(len(self._shards))
        self._shards.append(
            write_shard(
                target.root, self._split, stem, rows, target.source, list_lengths=self._layout.kind == "sft"
            )
        )
        self.counts += np.bincount(answer_tokens(rows), minlength=len(self.counts))
        self.seconds += time.thread_time() - begun
