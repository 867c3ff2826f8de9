"""Group a stream of items so that each group is worth one call and fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
BATCH_CHARS = 1 << 20  # of text: its words take some 60 bytes each


def batches(items: Iterable[T], size_of: Callable[[T], int], full: int = BATCH_CHARS) -> Iterator[list[T]]:
    """Consecutive lists of items, each ended by the item with which it reaches the size `full`."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= full:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
