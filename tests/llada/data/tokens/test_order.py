import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada.data.tokens.order import Permutation, stream_indices


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 1000))
def test_it_is_a_bijection(n, seed, epoch):
    values = Permutation(n, seed, epoch)(np.arange(n))
    assert np.array_equal(np.sort(values), np.arange(n))


@given(
    st.integers(1, 2**61),
    st.integers(0, 100),
    st.lists(st.integers(0, 2**61), min_size=1, max_size=20, unique=True),
)
def test_huge_ranges_stay_inside_and_distinct(n, seed, positions):
    positions = np.unique(np.array(positions) % n)
    values = Permutation(n, seed, 0)(positions)
    assert ((values >= 0) & (values < n)).all()
    assert len(np.unique(values)) == len(positions)


def test_the_order_is_frozen():
    """A resumed run relies on these numbers: changing them is a change of format."""
    assert Permutation(10, 0, 0)(np.arange(10)).tolist() == [4, 7, 0, 9, 2, 1, 8, 3, 6, 5]
    assert Permutation(10**12, 1, 2)(np.array([0, 1, 10**12 - 1])).tolist() == [
        632562376698,
        658102476151,
        701343882107,
    ]


def test_it_looks_random():
    """Rank correlation with the identity and between epochs, and the share of fixed points, are those of chance."""
    n = 20_000
    first, second = (Permutation(n, 7, epoch)(np.arange(n)) for epoch in (0, 1))
    for a, b in ((first, np.arange(n)), (first, second), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(n)
    assert (first == np.arange(n)).sum() < 10
    deciles = np.bincount(first[: n // 10] * 10 // n, minlength=10)
    assert abs(deciles - n / 100).max() < 5 * np.sqrt(n / 100)


@pytest.mark.parametrize(("start", "count"), [(0, 7), (5, 30), (13, 1), (0, 0)])
def test_a_stream_can_be_entered_anywhere(start, count):
    epochs, rows = stream_indices(7, 3, 0, 50)
    part_epochs, part_rows = stream_indices(7, 3, start, count)
    assert np.array_equal(part_epochs, epochs[start : start + count])
    assert np.array_equal(part_rows, rows[start : start + count])
    for epoch in range(7):
        assert sorted(rows[epochs == epoch]) == list(range(7))


def test_bad_arguments():
    with pytest.raises(ValueError, match="cannot permute 0 rows"):
        Permutation(0, 0, 0)
    with pytest.raises(IndexError):
        Permutation(5, 0, 0)(np.array([5]))
