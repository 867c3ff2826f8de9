"""The mixer that everything hashed here rests on: SplitMix64's finaliser (Steele, Lea & Flood 2014), on numpy.

A bijection of 64-bit integers in which every input bit changes about half of the output bits. Its wrap-around arithmetic
is exact, so the same integers give the same bits on every machine; `llada.diffusion.noise.mix` is the same on tensors.
"""

from __future__ import annotations

import numpy as np

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""2⁶⁴ / φ made odd: the step between the states of SplitMix64."""

MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""What the finaliser multiplies with, in order."""

SHIFTS = (30, 27, 31)
"""By how many bits the finaliser shifts to the right, in order."""


def mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of every value, elementwise. uint64 -> uint64 of the same shape."""
    values = (values ^ (values >> np.uint64(SHIFTS[0]))) * np.uint64(MULTIPLIERS[0])
    values = (values ^ (values >> np.uint64(SHIFTS[1]))) * np.uint64(MULTIPLIERS[1])
    return values ^ (values >> np.uint64(SHIFTS[2]))
