"""The order of samples as arithmetic: no list is stored, any position of any epoch is computed directly.

global position i -> epoch i // n, and inside it Permutation(n, seed, epoch)(i % n)
"""

from __future__ import annotations

import hashlib

import numpy as np

from llada.mixing import mix64

_ROUNDS = 8
_U64 = np.uint64


class Permutation:
    """The order of n rows in one epoch, a pseudo-random bijection of 0..n-1 in constant memory.

    A Feistel network permutes 0..4**k - 1, the smallest such range that holds n; a result of n or more is permuted
    again until it falls below n (cycle walking), which keeps the map one-to-one. On average that is < 4 rounds.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if not 1 <= n < 1 << 62:
            raise ValueError(f"cannot permute {n} rows")
        self.n = n
        self._half_bits = _U64(max(1, -(-(n - 1).bit_length() // 2)))
        self._half_mask = (_U64(1) << self._half_bits) - _U64(1)
        digest = hashlib.blake2b(
            f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS, person=b"sample order"
        ).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 rows for int64 `positions`, both in 0..n-1 and of any shape."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.n):
            raise IndexError(f"positions must lie in 0..{self.n - 1}")
        values = self._shuffle(positions.reshape(-1).astype(_U64))
        while len(outside := np.flatnonzero(values >= _U64(self.n))):
            values[outside] = self._shuffle(values[outside])
        return values.astype(np.int64).reshape(positions.shape)

    def _shuffle(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right + key) & self._half_mask)
        return (left << self._half_bits) | right


def stream_indices(n: int, seed: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, rows), int64 (count,), of the positions start..start+count-1 of the endless stream over n rows."""
    positions = np.arange(start, start + count, dtype=np.int64)
    epochs = positions // n
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = Permutation(n, seed, int(epoch))(positions[here] % n)
    return epochs, rows
