"""Filling parameters, of which a worker may hold some rows: no full tensor is made for it, and nothing is communicated.

Initial weights are counter-based random numbers, a pure function of (seed, name of the parameter, row, column): the rows
that a worker draws are those of the whole, at any number of workers, on its own device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from llada.diffusion.noise import normals, row_keys, stream_key

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Numbers that are drawn at once, in float64.
_CHUNK = 1 << 20


class Rows(Protocol):
    """A tensor, in memory or in a file, whose rows can be taken."""

    def __getitem__(self, rows: slice) -> Tensor: ...


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether several workers hold a tensor together. Their kind of tensor is imported where there are several only: it takes
    as long as half of torch."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """What this worker holds of a parameter, a plain tensor, and the number of its first row in the whole."""
    if not is_sharded(parameter):
        return parameter, 0
    from torch.distributed.tensor import Replicate, Shard

    # Private: the place of a shard in the whole is asked by whoever checkpoints or fills one, and torch has no public answer.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert all(type(p) is Replicate or p == Shard(0) for p in parameter.placements), parameter.placements
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return parameter.to_local(), offset[0]


def copy_full_(parameter: Tensor, full: Rows) -> None:
    """Copy a full tensor into a parameter, or its rows into this worker's shard of it."""
    rows, start = local_rows(parameter)
    if len(rows):  # a file does not give none
        rows.copy_(full[start : start + len(rows)])


@torch.no_grad()
def draw_normal_(parameter: Tensor, seed: int, name: str, std: float) -> None:
    """Draw a matrix from a normal distribution, cut at ±3 std and not widened again for it (std is that before the cut)."""
    rows, start = local_rows(parameter)
    key = stream_key(seed, f"initial {name}")
    width = parameter.shape[1]
    step = max(1, _CHUNK // width)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        ids = torch.arange(start + first, start + first + len(part), device=part.device)
        part.copy_(normals(row_keys(key, ids), width, std))
