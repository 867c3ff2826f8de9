"""What worker 0 does for a checkpoint of many workers: DCP's plan and its .metadata, in time, bytes and memory by shard.

    python tests/benchmarks/checkpoint_metadata.py [--results FOLDER] [--quick]

Every worker sends worker 0 the plan of its shards; that joins them, checks them, and writes .metadata, which every worker reads
when the run goes on. Here one process makes the plans of as many workers as are asked for and does worker 0's part with
PyTorch's own functions. llada/plan/checkpoints.py reckons with the figures of the most workers. Writes checkpoint_metadata.json.
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from sampling_model import machine
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

ROWS, COLUMNS = 16, 4096  # of a shard


def plan_of(rank: int, workers: int, names: list[str]) -> SavePlan:
    """What a worker sends: a shard of each tensor."""
    size, offset = torch.Size([ROWS * workers, COLUMNS]), torch.Size([ROWS * rank, 0])
    chunk, properties = (
        ChunkStorageMetadata(offset, torch.Size([ROWS, COLUMNS])),
        TensorProperties(dtype=torch.float32),
    )
    return SavePlan(
        [
            WriteItem(
                MetadataIndex(name, offset),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, size),
            )
            for name in names
        ],
        planner_data={name: (name,) for name in names},
    )


def measure(workers: int, tensors: int, shared_by: int) -> dict[str, Any]:
    """Of one size, where so many workers share a copy; times are worker 0's CPU seconds. A shard is counted as often as
    worker 0 is sent it."""
    names = [f"optim.layers.{number}.attention.q_proj.weight.exp_avg" for number in range(tensors)]
    sent = [pickle.dumps(plan_of(rank % shared_by, shared_by, names)) for rank in range(workers)]
    shards = workers * tensors
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    plans = [pickle.loads(data) for data in sent]
    received = time.process_time()
    plans, metadata = DefaultSavePlanner().create_global_plan(plans)
    planned = time.process_time()
    metadata.storage_data = {
        item.index: _StorageInfo(f"__{rank}_{number % 4}.distcp", number << 20, ROWS * COLUMNS * 4)
        for rank, plan in enumerate(plans)
        for number, item in enumerate(plan.items)
    }
    data = pickle.dumps(metadata)
    written = time.process_time()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    pickle.loads(data)
    return {
        "workers": workers,
        "workers_of_a_copy": shared_by,
        "tensors": tensors,
        "shards": shards,
        "sent_bytes_per_shard": sum(map(len, sent)) / shards,
        "metadata_bytes_per_shard": len(data) / (tensors * shared_by),
        "receive_us_per_shard": (received - begun) / shards * 1e6,
        "plan_us_per_shard": (planned - received) / shards * 1e6,
        "write_us_per_shard": (written - planned) / shards * 1e6,
        "worker_0_us_per_shard": (written - begun) / shards * 1e6,
        "read_us_per_shard": (time.process_time() - written) / shards * 1e6,
        "worker_0_bytes_per_shard": peak / shards,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    sizes = [(2, 2), (4, 2)] if args.quick else [(64, 64), (1024, 1024), (1024, 8), (4096, 8), (4096, 4096)]
    # Each in a process of its own, whose memory knows nothing of the others.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        measured = [pool.submit(measure, workers, 100, copy).result() for workers, copy in sizes]
    found = {"machine": machine(), "measured": measured}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "checkpoint_metadata.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["measured"], indent=1))


if __name__ == "__main__":
    main()
