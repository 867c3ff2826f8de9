"""llada/data/dedup/clusters.py: sizes and largest clusters, against counting by hand."""

from __future__ import annotations

import json
import tempfile
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada.data.dedup.clusters import Cluster, Clusters, read_clusters, summarise, tally
from llada.files import join, write_bytes


def clusters_of(removals: list[tuple[int, int]], folder: str, groups: int, partitions: int) -> Clusters:
    """Through the files: removals (document, the one that stays), spread over the groups."""
    for group in range(groups):
        rows = np.array(removals[group::groups], dtype=np.uint64).reshape(-1, 2)
        tally(folder, group, rows, partitions)
    for partition in range(partitions):
        summarise(folder, groups, partitions, partition)
    write_bytes(join(folder, "clusters", "done.json"), json.dumps({"tasks": partitions}).encode())
    return read_clusters(folder)


@given(
    st.dictionaries(st.integers(100, 10_000), st.integers(0, 12), max_size=60),
    st.integers(1, 4),
    st.sampled_from([1, 2, 8]),
)
def test_sizes_are_those_of_counting(root_of, groups, partitions):
    """Root 0 stands for earlier snapshots, which have no clusters here."""
    with tempfile.TemporaryDirectory() as folder:
        found = clusters_of(list(root_of.items()), folder, groups, partitions)
    sizes = Counter(root for root in root_of.values() if root)
    assert found.number == len(sizes)
    assert found.documents == sum(sizes.values()) + len(sizes)
    assert found.sizes == Counter((size + 1).bit_length() - 1 for size in sizes.values())
    ranked = sorted(sizes, key=lambda root: (-sizes[root], root))[:8]
    assert [(c.size, c.ids[0]) for c in found.largest] == [(sizes[root] + 1, root) for root in ranked]
    for cluster in found.largest:
        root, *members = cluster.ids
        assert members == sorted(d for d, r in root_of.items() if r == root)[: len(members)]
        assert len(members) == min(3, sizes[root])


@pytest.mark.parametrize("size", [2, 3, 4, 1 << 17, (1 << 17) + 1])
def test_a_cluster_of_any_size(tmp_path, size):
    found = clusters_of([(document, 1) for document in range(2, size + 1)], str(tmp_path), 3, 2)
    assert found.sizes == {size.bit_length() - 1: 1}
    assert found.largest == [Cluster(size, tuple(range(1, min(size, 4) + 1)))]
