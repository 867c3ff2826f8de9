"""Connected components of a graph that fits no machine: alternating large-star and small-star rounds on files
(Kiveris et al. 2014, "Connected Components in MapReduce and Beyond").

Nodes are uint64. An edge is a row (high, low), high > low, and lives in the partition of its high node. A round is:
    small_star  of each high node the edge to its lowest neighbour stays, the other neighbours hang below that one
    large_star  (high, low) becomes (high, lowest neighbour of low)
until every node has one edge and it leads to the smallest node of its component. Large-star needs the lowest
neighbour of `low`, which another partition knows; it is asked once for all edges of a partition. So no node is a hub:
what hangs below a node is spread over all partitions by its own hash, and the many low neighbours that a node may get
are hung below each other where they arise, before they are sent. What one task holds are the edges of its high nodes.
Rounds are O(log² n), in practice at most log2 of the longest path: clusters of documents take three to six.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import numpy as np

from llada.data.dedup.exchange import (
    MapTasks,
    find_sorted,
    hash_partition,
    part_url,
    part_urls,
    read_partition,
    run_starts,
    run_step,
    unique_rows,
    write_exchange,
)
from llada.files import join
from llada.mixing import mix64

_LOCAL_PASSES = 4  # of small-star over what one task holds; rounds do the rest


@dataclass(frozen=True)
class Graph:
    """The edges to start from and how the work is divided: `partitions` is a power of two and divides that with
    which the edge files (`part_urls(edges, files)`, see `write_edges`) were written."""

    edges: str
    files: int
    partitions: int
    nodes_per_block: int
    """The result is partitioned by node // nodes_per_block, for readers that want a range of nodes."""
    blocks: int


def node_partition(nodes: np.ndarray, partitions: int) -> np.ndarray:
    """The partition (n,) of nodes (n,)."""
    return hash_partition(mix64(nodes), partitions)


def write_edges(url: str, edges: np.ndarray, partitions: int) -> int:
    """Write edges uint64 (n, 2), each (high, low), as an exchange file by their high nodes; returns how many."""
    edges = unique_rows(edges)
    return write_exchange(url, edges, node_partition(edges[:, 0], partitions), partitions)


def connected_components(graph: Graph, folder: str, map_tasks: MapTasks) -> str:
    """The folder of `graph.partitions` exchange files with a row (node, smallest node of its component) for each node
    that is not the smallest of its own, partitioned by block.

    Works in `folder`, whose URL must name everything the graph depends on: rounds that are complete are not run again.
    """
    numbers = range(graph.partitions)
    previous = None
    for number in itertools.count():
        current = join(folder, f"round-{number:03d}")
        run_step(join(current, "edges"), partial(small_star, graph, previous, current), numbers, map_tasks)
        unsettled = run_step(join(current, "stars"), partial(large_star, graph, current), numbers, map_tasks)
        if unsettled == 0:
            break
        previous = current
    return join(current, "stars")


def small_star(graph: Graph, previous: str | None, current: str, partition: int) -> int:
    """One task of the first half of a round; returns its edges. `previous`, `current`: folders of the rounds, None
    before the first."""
    count = graph.partitions
    if previous is None:
        edges = read_partition(part_urls(graph.edges, graph.files), partition, count)
    else:
        edges = read_partition([part_url(join(previous, "stars"), partition)], 0, 1)
        answers = read_partition(part_urls(join(previous, "answers"), count), partition, count)
        edges = _replace_low(edges, unique_rows(answers))
    for _ in range(_LOCAL_PASSES):
        edges = unique_rows(edges)
        first = run_starts(edges[:, 0])
        lowest = edges[first, 1][np.cumsum(first) - 1]
        hung = np.column_stack([edges[~first, 1], lowest[~first]])
        edges = np.concatenate([edges[first], hung])
        if not len(hung):
            break
    edges = unique_rows(edges)
    home = node_partition(edges[:, 0], count)
    write_exchange(part_url(join(current, "edges"), partition), edges, home, count)
    questions = unique_rows(np.column_stack([edges[:, 1], home.astype(np.uint64)]))
    asked = node_partition(questions[:, 0], count)
    write_exchange(part_url(join(current, "questions"), partition), questions, asked, count)
    return len(edges)


def large_star(graph: Graph, current: str, partition: int) -> int:
    """One task of the second half: settle this partition's edges, answer the questions about its nodes. Returns the
    number of edges that are not final; 0 in all partitions ends the rounds."""
    count = graph.partitions
    edges = unique_rows(read_partition(part_urls(join(current, "edges"), count), partition, count))
    first = run_starts(edges[:, 0])
    nodes, lowest = edges[first].T
    questions = unique_rows(read_partition(part_urls(join(current, "questions"), count), partition, count))
    place, known = find_sorted(nodes, questions[:, 0])
    answers = np.column_stack([questions[known, 0], lowest[place[known]]])
    write_exchange(part_url(join(current, "answers"), partition), answers, questions[known, 1], count)
    block = edges[:, 0] // np.uint64(graph.nodes_per_block)
    write_exchange(part_url(join(current, "stars"), partition), edges, block, graph.blocks)
    return int((~first).sum()) + len(answers)


def _replace_low(edges: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Edges (n, 2) whose low node is lowered to what `answers` (node, its lowest neighbour), sorted, say."""
    place, known = find_sorted(answers[:, 0], edges[:, 1])
    low = edges[:, 1].copy()
    low[known] = answers[place[known], 1]
    return np.column_stack([edges[:, 0], low])
