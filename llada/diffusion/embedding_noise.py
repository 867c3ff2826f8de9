"""Noise on the embeddings of masked tokens while a network that began autoregressive gets used to them (LLaDA2.0, arXiv
2512.15745, §7.1).

Weight decay has driven the row of a token that was never seen to nearly nothing, and the RMS norm of rows full of masks then
blows its gradient up. Independent Gaussian noise at each masked token keeps what is normed as long as a token's. How large it is
and how long it stays, the report does not say: here it falls evenly to none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llada.diffusion.noise import normals
from llada.settings import check_limits, limited, require

# Numbers that are drawn at once, in float64.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class EmbeddingNoiseConfig:
    """Gaussian noise on masked tokens' embeddings at the start of training (LLaDA2.0). Validation has none."""

    std: float = limited(0.0, low=0)
    """Standard deviation at the first step, in the embedding's own units: that of its trained rows makes masks as long as
    tokens. 0: none."""
    steps: int = limited(0, low=0)
    """Steps over which it falls evenly to none."""

    def __post_init__(self) -> None:
        check_limits(self, "objective.embedding_noise")
        require(
            (self.std > 0) == (self.steps > 0),
            f"objective.embedding_noise: std {self.std} and steps {self.steps} are nothing without each other: set both or none",
        )

    def std_at(self, step: int) -> float:
        """Of this step (0-based)."""
        return self.std * (1 - step / self.steps) if step < self.steps else 0.0


def add_noise_at(x: Tensor, positions: Tensor, keys: Tensor, std: Tensor, *, length: int) -> Tensor:
    """The embeddings x (b, C, D) with noise at some of their first `length` columns.

    Args:
        positions: (N,) int64 into the b · length.
        keys: (N,) int64, of each position's numbers.
        std: (N,) float, of each position's; where it is 0, nothing changes.
    """
    noise = x.new_empty(len(positions), x.shape[-1])
    size = max(1, _CHUNK // x.shape[-1])
    for part, part_keys, part_std in zip(noise.split(size), keys.split(size), std.split(size), strict=True):
        part.copy_(normals(part_keys, x.shape[-1], 1.0) * part_std[:, None])
    rows = positions // length * x.shape[1] + positions % length
    return x.flatten(0, 1).index_add(0, rows, noise).view_as(x)
