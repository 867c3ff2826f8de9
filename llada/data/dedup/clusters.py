"""Clusters of duplicates: how many there are of which size, and the largest ones. Tasks on files, like steps.py.

    tally      per group of units: how many documents of the group go for the sake of which other
    summarise  per partition of those others: their clusters' sizes -> `read_clusters`

A cluster is a document that stays and all that go for it; what goes for an earlier snapshot's is in none.
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np

from llada.data.dedup.components import node_partition
from llada.data.dedup.exchange import (
    part_url,
    part_urls,
    read_partition,
    run_starts,
    sort_rows,
    write_exchange,
)
from llada.files import join, read_bytes, write_bytes

_LARGEST = 8
_MEMBERS = 3  # that are named, beside the one that stays
_THREADS = 16


@dataclass(frozen=True)
class Cluster:
    """Some of its documents by their ids (see steps.py): the one that stays, and the first that go for it."""

    size: int
    ids: tuple[int, ...]


@dataclass
class Clusters:
    """Those of a snapshot: the documents in them are `documents`, of which `number` stay."""

    number: int = 0
    documents: int = 0
    sizes: Counter[int] = field(default_factory=Counter)
    """{k: clusters of 2^k to 2^(k+1) - 1 documents}"""
    largest: list[Cluster] = field(default_factory=list)
    """Largest first."""


def tally(folder: str, group: int, removals: np.ndarray, partitions: int) -> None:
    """Write how often each document that stays stands in the removals (document, the one that stays), uint64 (n, 2), of
    a group of units, with the first that go for it."""
    rows = sort_rows(removals[removals[:, 1] > 0][:, ::-1])
    starts = np.flatnonzero(run_starts(rows[:, 0]))
    counts = np.diff(np.append(starts, len(rows)))
    # A cluster of fewer members than are named repeats its last one.
    members = [rows[starts + np.minimum(place, counts - 1), 1] for place in range(_MEMBERS)]
    tallied = np.column_stack([rows[starts, 0], counts.astype(np.uint64), *members])
    write_exchange(_tally_url(folder, group), tallied, node_partition(tallied[:, 0], partitions), partitions)


def summarise(folder: str, groups: int, partitions: int, partition: int) -> int:
    """Write the sizes of the clusters of one partition, and the largest of them; returns their number."""
    rows = sort_rows(read_partition(part_urls(join(folder, "tallies"), groups), partition, partitions))
    starts = np.flatnonzero(run_starts(rows[:, 0]))
    sizes = (np.add.reduceat(rows[:, 1], starts) if len(starts) else rows[:, 1]).astype(np.int64) + 1
    ends = np.append(starts[1:], len(rows))
    largest = []
    for place in np.lexsort((rows[starts, 0], -sizes))[:_LARGEST]:
        members = np.unique(rows[starts[place] : ends[place], 2:])[:_MEMBERS]
        ids = (int(rows[starts[place], 0]), *map(int, members))
        largest.append(asdict(Cluster(int(sizes[place]), ids)))
    bins = Counter((np.frexp(sizes)[1] - 1).tolist())  # exact: sizes are below 2^53
    described = {"documents": int(sizes.sum()), "sizes": bins, "largest": largest}
    write_bytes(_summary_url(folder, partition), json.dumps(described).encode())
    return len(starts)


def read_clusters(folder: str) -> Clusters:
    """The sum over all partitions, when the step is done."""
    partitions = json.loads(read_bytes(join(folder, "clusters", "done.json")))["tasks"]
    total = Clusters()
    with ThreadPoolExecutor(_THREADS) as pool:
        for data in pool.map(lambda number: read_bytes(_summary_url(folder, number)), range(partitions)):
            summary = json.loads(data)
            sizes = Counter({int(k): number for k, number in summary["sizes"].items()})
            total.number += sizes.total()
            total.documents += summary["documents"]
            total.sizes += sizes
            largest = [Cluster(entry["size"], tuple(entry["ids"])) for entry in summary["largest"]]
            ranked = sorted([*total.largest, *largest], key=lambda c: (-c.size, c.ids[0]))
            total.largest = ranked[:_LARGEST]
    return total


def _tally_url(folder: str, group: int) -> str:
    return part_url(join(folder, "tallies"), group)


def _summary_url(folder: str, partition: int) -> str:
    return join(folder, "clusters", f"{partition:06d}.json")
