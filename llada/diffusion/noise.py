"""Noise that belongs to the sample: counter-based random numbers, a pure function of integers.

No generator state anywhere: the uniform of (seed, purpose, epoch, sample, position) is a hash of those numbers, so one
worker or eight, another micro-batch size, another device or a resumed run see the same masks, and training, validation
and likelihood never share a stream. The mixer is SplitMix64's finaliser (Steele, Lea & Flood 2014), whose 64-bit
wrap-around arithmetic is exact on every device.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers whose output bits look independent of the input's. int64 -> int64."""
    x = (x ^ shift_right(x, 30)) * MIX_1
    x = (x ^ shift_right(x, 27)) * MIX_2
    return x ^ shift_right(x, 31)


def stream_key(seed: int, purpose: str, *path: int) -> int:
    """The key of a stream, e.g. ("train-mask", epoch): different arguments, unrelated streams."""
    key = torch.tensor(seed, dtype=torch.int64)
    for part in (zlib.crc32(purpose.encode()), *path):
        key = mix(key * GOLDEN + part + 1)
    return int(key)


def row_keys(key: int | Tensor, ids: Tensor) -> Tensor:
    """(B,) keys of the rows with these ids (B,) int64; `key` may differ per row."""
    return mix(mix(ids * GOLDEN + key) + key)


def row_uniforms(keys: Tensor, length: int) -> Tensor:
    """(B, length) float32 in [0, 1), 24 random bits each, one independent sequence per row key."""
    position = torch.arange(1, length + 1, device=keys.device, dtype=torch.int64) * GOLDEN
    bits = mix(keys[:, None] + position)
    return shift_right(bits, 40).to(torch.float32) * 2.0**-24


def uniforms(key: int, ids: Tensor) -> Tensor:
    """(B,) float64 in [0, 1), 53 random bits, one number per id."""
    return uniforms_of(row_keys(key, ids))


def uniforms_of(keys: Tensor) -> Tensor:
    """Float64 in [0, 1), 53 random bits, one number per key, of any shape."""
    return shift_right(keys, 11).to(torch.float64) * 2.0**-53
