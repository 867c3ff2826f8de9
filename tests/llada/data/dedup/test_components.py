from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.data.dedup.components import Graph, connected_components, write_edges
from llada.data.dedup.exchange import part_url, part_urls, read_partition


def smallest_of_component(edges: np.ndarray) -> dict[int, int]:
    """Union-find over all edges at once: {node: smallest node of its component}, the smallest nodes left out."""
    parent: dict[int, int] = {}

    def find(node: int) -> int:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for high, low in edges.tolist():
        a, b = find(high), find(low)
        parent[max(a, b)] = min(a, b)
    return {node: find(node) for node in list(parent) if find(node) != node}


def solve(
    edges: np.ndarray, folder: Path, partitions: int, files: int = 3, map_tasks=map
) -> tuple[dict[int, int], int]:
    """({node: smallest}, rounds) by the code under test."""
    for number, part in enumerate(np.array_split(edges, files)):
        write_edges(part_url(str(folder / "graph"), number), part, partitions)
    graph = Graph(str(folder / "graph"), files, partitions, nodes_per_block=1 << 62, blocks=4)
    stars = connected_components(graph, str(folder / "work"), map_tasks)
    blocks = [read_partition(part_urls(stars, partitions), block, 4) for block in range(4)]
    assert all((rows[:, 0] >> np.uint64(62) == block).all() for block, rows in enumerate(blocks))
    rows = np.concatenate(blocks)
    result = dict(rows.tolist())
    assert len(result) == len(rows)  # one row for each node
    return result, len(list((folder / "work").glob("round-*")))


def as_edges(pairs) -> np.ndarray:
    pairs = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    return np.column_stack([pairs.max(axis=1), pairs.min(axis=1)])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)).filter(lambda e: e[0] != e[1]), max_size=30),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
)
def test_random_graphs(pairs, partitions, is_spread):
    edges = as_edges(pairs)
    if is_spread:  # over all blocks of node numbers, in another order
        edges = as_edges(edges * np.uint64(0x9E3779B97F4A7C15))
    with TemporaryDirectory() as folder:
        assert solve(edges, Path(folder), partitions)[0] == smallest_of_component(edges)


CHAIN = np.column_stack([np.arange(1, 600), np.arange(599)])
SHUFFLED = np.random.default_rng(0).permutation(600)
SHAPES = {
    "chain": CHAIN,
    "shuffled chain": SHUFFLED[CHAIN],
    "zigzag": [[high, low] for low in range(200) for high in (1000 - low, 999 - low)],
    "clique": [[a, b] for a in range(40) for b in range(a)],
    "low hub": [[leaf, 0] for leaf in range(1, 2000)],
    "high hub": [[5000, leaf] for leaf in range(2000)],
    "middle hubs": [[hub, leaf] for hub in (500, 1000) for leaf in range(0, 1500, 3) if leaf != hub]
    + [[500, 1000]],
    "many small": [[3 * n + a, 3 * n + b] for n in range(500) for a, b in ((1, 0), (2, 1))],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, tmp_path):
    edges = as_edges(SHAPES[shape])
    result, rounds = solve(edges, tmp_path, 4)
    assert result == smallest_of_component(edges)
    assert rounds <= 14  # log2 of the longest path is 9.2


@pytest.mark.parametrize("start", range(0, 800, 100))
def test_two_low_neighbours_that_are_both_smallest(start, tmp_path):
    """After one round that is all that is unsettled: no node has been asked about that is not the smallest."""
    edges = as_edges([[60, 50], [60, 1], [61, 50], [61, 2]]) + np.uint64(start)
    assert set(solve(edges, tmp_path, 4)[0].values()) == {start + 1}


def test_partitions_and_order_of_tasks_change_nothing(tmp_path):
    edges = as_edges(np.random.default_rng(3).integers(0, 4000, (3000, 2)))
    edges = edges[edges[:, 0] != edges[:, 1]]
    expected = smallest_of_component(edges)

    def backwards(task, numbers):
        # Each twice, the last first.
        return [task(number) for number in reversed(numbers) for _ in range(2)][::2]

    for name, partitions, map_tasks in (("one", 1, map), ("many", 8, map), ("again", 8, backwards)):
        assert solve(edges, tmp_path / name, partitions, map_tasks=map_tasks)[0] == expected
    for path in sorted((tmp_path / "many").rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "many")).read_bytes()


HUBS = {
    "many above": [[20_005, leaf] for leaf in range(5)] + [[node, 5] for node in range(6, 20_006)],
    # each of those above 20,000 has a low neighbour of its own, which becomes one of 20,000
    "many below": [pair for n in range(20_000) for pair in ([20_001 + n, 20_000], [20_001 + n, n])],
}


@pytest.mark.parametrize("shape", HUBS)
def test_no_task_meets_a_hub(shape, tmp_path):
    """A node with 20,000 neighbours: no partition may hold much more than its share of any file set."""
    edges = as_edges(HUBS[shape])
    result, rounds = solve(edges, tmp_path, 16)
    assert result == smallest_of_component(edges)
    for number in range(rounds):
        for wave in ("edges", "questions", "answers"):
            urls = part_urls(str(tmp_path / "work" / f"round-{number:03d}" / wave), 16)
            sizes = [len(read_partition(urls, partition, 16)) for partition in range(16)]
            assert max(sizes) < 1.25 * len(edges) / 16


def test_a_crash_between_tasks_is_resumed(tmp_path):
    edges = as_edges(SHAPES["shuffled chain"])
    solve(edges, tmp_path / "whole", 4)
    budget = [0]

    def dying(task, numbers):
        for number in numbers:
            if budget[0] == 0:
                raise InterruptedError
            budget[0] -= 1
            yield task(number)

    for _ in range(100):
        budget[0] = 7
        try:
            solve(edges, tmp_path / "broken", 4, map_tasks=dying)
            break
        except InterruptedError:
            pass
    files = {
        name: {
            p.relative_to(tmp_path / name): p.read_bytes()
            for p in (tmp_path / name).rglob("*")
            if p.is_file()
        }
        for name in ("whole", "broken")
    }
    assert files["whole"] == files["broken"]
