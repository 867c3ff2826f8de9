"""Counter-based noise: uniform, reproducible, and unrelated between any two streams."""

import itertools

import pytest
import torch
from torch import Tensor

from llada.diffusion.noise import mix, row_keys, row_uniforms, shift_right, stream_key, uniforms

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator in Python's own integers."""
    out = []
    for _ in range(count):
        state = (state + GOLDEN_GAMMA) & WORD
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        out.append(z ^ (z >> 31))
    return out


@pytest.mark.parametrize("state", [0, 1, 1234567, WORD, 1 << 63])
def test_a_row_is_the_splitmix64_sequence_of_its_key(state: int) -> None:
    signed = state - (1 << 64) if state >> 63 else state
    row = row_uniforms(torch.tensor([signed]), 50)[0]
    assert row.tolist() == [(z >> 40) / 2**24 for z in splitmix64(state, 50)]
    # The finaliser's published vector: the first output from state 0.
    assert splitmix64(0, 1) == [0xE220A8397B1DCDAF]


def test_logical_shift_of_negative_numbers() -> None:
    assert shift_right(torch.tensor([-1, 8]), 60).tolist() == [15, 0]


def chi_square(u: Tensor, bins: int) -> float:
    counts = torch.bincount((u.flatten().double() * bins).long(), minlength=bins).double()
    expected = u.numel() / bins
    return float(((counts - expected) ** 2 / expected).sum())


def test_uniforms_are_uniform() -> None:
    keys = row_keys(stream_key(0, "x"), torch.arange(500))
    for u in (
        row_uniforms(keys, 400),
        row_uniforms(keys, 1),  # over rows, at one position
        uniforms(stream_key(0, "y"), torch.arange(100_000)),
    ):
        assert u.min() >= 0
        assert u.max() < 1
        bins = 64 if u.numel() > 10_000 else 16
        # 64 bins: mean 63, standard deviation 11.2; five of them.
        assert abs(chi_square(u, bins) - (bins - 1)) < 5 * (2 * (bins - 1)) ** 0.5


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def test_streams_are_unrelated() -> None:
    ids = torch.arange(200)
    streams = {
        (seed, purpose, path): row_uniforms(row_keys(stream_key(seed, purpose, *path), ids), 100)
        for seed in (0, 1)
        for purpose in ("train-mask", "validation-mask")
        for path in ((), (0,), (1,), (0, 1), (1, 0))
    }
    for (one, a), (two, b) in itertools.combinations(streams.items(), 2):
        # 20 000 pairs: the correlation of independent numbers has standard deviation 0.007.
        assert abs(correlation(a, b)) < 0.036, (one, two)
        assert abs(correlation(a[1:], b[:-1])) < 0.036, (one, two, "neighbouring rows")


def test_rows_and_positions_are_unrelated() -> None:
    u = row_uniforms(row_keys(stream_key(7, "x"), torch.arange(301)), 101)
    assert abs(correlation(u[1:], u[:-1])) < 0.03  # 30 000 pairs: 0.006 each
    assert abs(correlation(u[:, 1:], u[:, :-1])) < 0.03
    assert abs(correlation(u[1:, 1:], u[:-1, :-1])) < 0.03


def test_a_row_depends_on_nothing_but_its_id() -> None:
    key, ids = stream_key(3, "x", 5), torch.tensor([9, 2, 400])
    together = row_uniforms(row_keys(key, ids), 20)
    for row, sample in enumerate(ids):
        assert torch.equal(row_uniforms(row_keys(key, sample[None]), 20)[0], together[row])
    assert torch.equal(row_uniforms(row_keys(key, ids), 7), together[:, :7])  # a cut row keeps its noise


def test_mix_is_one_to_one_on_a_sample() -> None:
    x = torch.cat([torch.arange(-5000, 5000), torch.arange(5000) << 40])
    assert len(mix(x.unique()).unique()) == len(x.unique())


def test_seeds_count_modulo_2_to_the_64() -> None:
    assert stream_key(-1, "order") == stream_key(2**64 - 1, "order")
    assert stream_key(2**63, "order") != stream_key(2**63 - 1, "order")
