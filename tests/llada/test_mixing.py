"""The mixer: SplitMix64's published numbers, and the same bits from numpy and from torch."""

import numpy as np
import torch

from llada.diffusion.noise import GOLDEN, mix
from llada.mixing import GOLDEN_GAMMA, mix64

EDGES = [0, 1, 2, GOLDEN_GAMMA, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1]


def test_the_published_sequence_from_state_zero() -> None:
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    assert [hex(z) for z in mix64(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_numpy_and_torch_mix_alike() -> None:
    random = np.random.default_rng(0).integers(0, 1 << 64, 100_000, dtype=np.uint64)
    values = np.concatenate([np.array(EDGES, dtype=np.uint64), random])
    mixed = mix64(values)
    assert mixed.dtype == np.uint64
    assert np.array_equal(mixed, mix(torch.from_numpy(values.view(np.int64))).numpy().view(np.uint64))
    assert len(np.unique(mixed)) == len(np.unique(values))  # a bijection


def test_any_shape() -> None:
    values = np.arange(24, dtype=np.uint64).reshape(2, 3, 4)
    assert np.array_equal(mix64(values).ravel(), mix64(values.ravel()))
    assert mix64(np.zeros(0, dtype=np.uint64)).shape == (0,)


def test_the_constant_of_torch_is_the_signed_one() -> None:
    assert GOLDEN % (1 << 64) == GOLDEN_GAMMA
    assert -(1 << 63) <= GOLDEN < 1 << 63
