"""What the checkpoints of a run weigh, and how long it takes to save one and to go back to it.

A checkpoint is copied from each GPU to its host while the steps stand still, and written beside them, every node its share
(llada/training/checkpoint/save.py). Before a run goes on, the checksums are compared, once over all workers, and then each
worker reads its shards, every group of `train.shard_workers` the whole (restore.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from llada.config import Recipe
from llada.training.memory import checkpoint_bytes
from llada.training.parallel import copy_size

COPY_RATE = 10e9
"""Bytes per second from a GPU to pinned memory of its host: a fifth of what PCIe 5.0 × 16 can do (an assumption)."""
STORE_RATES = (0.7e9, 2.5e9)
"""Bytes per second between one node and the object store: measured by Ray's users for uploads to S3 (ray-project/ray#38695),
and four fifths of 25 Gbit/s."""

SENT_S, SENT_BYTES = 20e-6, 960.0
"""Worker 0's CPU seconds, and its memory, for each shard of a tensor that a worker tells it of, those of other copies too
(tests/benchmarks/results/checkpoint_metadata.json, 4096 workers) ..."""
SHARD_S, SHARD_BYTES, METADATA_BYTES = 26e-6, 1250.0, 155.0
"""... and on top for each that it keeps, which takes so many bytes of .metadata (there)."""
_TENSORS_OF_A_LAYER = 9  # seven matrices, two norms


@dataclass(frozen=True)
class CheckpointPlan:
    """Times are (shortest, longest) seconds, by the rates of `STORE_RATES`."""

    bytes: float
    shards: int
    """Of all tensors: each is cut into as many as workers share a copy."""
    kept: int
    """At the end of the run."""
    stall: float
    """Seconds in which the steps stand still for one."""
    plan: float
    """Seconds in which worker 0 says where each shard goes, beside its steps."""
    plan_bytes: float
    """Of its memory meanwhile."""
    write: tuple[float, float]
    """With that."""
    read: tuple[float, float]
    """Checksums and shards, by all nodes at once."""

    @property
    def kept_bytes(self) -> float:
        return self.bytes * self.kept


def plan_checkpoints(
    recipe: Recipe,
    *,
    gpus: int,
    gpus_per_node: int,
    num_steps: int,
    rates: tuple[float, float] = STORE_RATES,
) -> CheckpointPlan:
    """The checkpoints of `recipe.pretrain`, as it is trained; `rates` in bytes per second and node, slow and fast."""
    train, size = recipe.pretrain.train, checkpoint_bytes(recipe.model, recipe.pretrain)
    nodes = -(-gpus // gpus_per_node)
    replicas = gpus // copy_size(gpus, train.shard_workers)
    kept = min(train.keep_checkpoints, max(1, num_steps // train.checkpoint_every))
    if train.keep_every is not None:
        kept += num_steps // train.keep_every
    slow, fast = rates
    # The weights and what the optimizer keeps of each; most of them have rows enough for every worker.
    copies = round(size / (4 * recipe.model.num_parameters))
    tensors = copies * (recipe.model.num_layers * _TENSORS_OF_A_LAYER + 3)
    shards = tensors * (gpus // replicas)
    plan = tensors * gpus * SENT_S + shards * SHARD_S
    return CheckpointPlan(
        bytes=size,
        shards=shards,
        kept=kept,
        stall=size * replicas / gpus / COPY_RATE,
        plan=plan,
        plan_bytes=tensors * gpus * SENT_BYTES + shards * SHARD_BYTES,
        write=(plan + size / nodes / fast, plan + size / nodes / slow),
        read=(size * (1 + replicas) / nodes / fast, size * (1 + replicas) / nodes / slow),
    )
