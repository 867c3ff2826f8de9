"""Noise that belongs to the sample: counter-based random numbers, a pure function of integers.

No generator state anywhere: the uniform of (seed, purpose, epoch, sample, position) is a hash of those numbers, so one
worker or eight, another micro-batch size, another device or a resumed run see the same masks, and training, validation
and likelihood never share a stream. The mixer is SplitMix64's finaliser (llada/mixing.py), whose 64-bit wrap-around
arithmetic is exact on every device.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from llada.mixing import GOLDEN_GAMMA, MULTIPLIERS, SHIFTS


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return word - (1 << 64) if word >> 63 else word


GOLDEN = _signed(GOLDEN_GAMMA)
_MULTIPLIERS = tuple(map(_signed, MULTIPLIERS))


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """`llada.mixing.mix64` on tensors: output bits look independent of the input's. int64 -> int64, any shape."""
    x = (x ^ shift_right(x, SHIFTS[0])) * _MULTIPLIERS[0]
    x = (x ^ shift_right(x, SHIFTS[1])) * _MULTIPLIERS[1]
    return x ^ shift_right(x, SHIFTS[2])


def stream_key(seed: int, purpose: str, *path: int) -> int:
    """The key of a stream, e.g. ("train-mask", epoch): different arguments, unrelated streams. Seeds count modulo 2⁶⁴."""
    key = torch.tensor(_signed(seed % (1 << 64)), dtype=torch.int64)
    for part in (zlib.crc32(purpose.encode()), *path):
        key = mix(key * GOLDEN + part + 1)
    return int(key)


def row_keys(key: int | Tensor, ids: Tensor) -> Tensor:
    """(B,) keys of the rows with these ids (B,) int64; `key` may differ per row."""
    return mix(mix(ids * GOLDEN + key) + key)


def sample_keys(seed: int, purpose: str, epochs: Tensor, sample_ids: Tensor) -> Tensor:
    """(B,) keys of the samples (B,) in their epochs (B,)."""
    keys = torch.empty_like(sample_ids)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        keys[here] = row_keys(stream_key(seed, purpose, epoch), sample_ids[here])
    return keys


def row_uniforms(keys: Tensor, length: int) -> Tensor:
    """(B, length) float32 in [0, 1), 24 random bits each, one independent sequence per row key."""
    position = torch.arange(1, length + 1, device=keys.device, dtype=torch.int64) * GOLDEN
    bits = mix(keys[:, None] + position)
    return shift_right(bits, 40).to(torch.float32) * 2.0**-24


def wide_uniforms(keys: Tensor, length: int) -> Tensor:
    """(N, length) float64 in [0, 1), 53 random bits each, one independent sequence per key (N,)."""
    position = torch.arange(1, length + 1, device=keys.device, dtype=torch.int64) * GOLDEN
    return uniforms_of(mix(keys[:, None] + position))


def normals(keys: Tensor, length: int, std: float) -> Tensor:
    """(N, length) float64 of a normal distribution, cut at ±3 std and not widened again for it (std is that before the cut)."""
    inside = math.erf(3 / math.sqrt(2))  # the share of the normal distribution that is not cut off
    uniform = wide_uniforms(keys, length)
    return uniform.mul_(2).sub_(1).mul_(inside).erfinv_().mul_(std * math.sqrt(2))


def uniforms(key: int, ids: Tensor) -> Tensor:
    """(B,) float64 in [0, 1), 53 random bits, one number per id."""
    return uniforms_of(row_keys(key, ids))


def uniforms_of(keys: Tensor) -> Tensor:
    """Float64 in [0, 1), 53 random bits, one number per key, of any shape."""
    return shift_right(keys, 11).to(torch.float64) * 2.0**-53
