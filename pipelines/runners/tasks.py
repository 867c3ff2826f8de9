"""Numbered tasks as Ray Data map tasks: what `prepare` does all its work with.

Ray Data reads a range of numbers; the driver holds neither the tasks nor, when they are folded as they come, their
results. A task writes its own output and must be repeatable: Ray starts those of a lost worker again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from pipelines.runners.failures import Failure, as_failure
from pipelines.runners.gauges import TaskGauges
from pipelines.stage.cluster import ClusterConfig, most_cpus, require_room

# Ray Data's bookkeeping is per block: a block of a long list holds many tasks. There are so many blocks ...
USUAL_BLOCKS = 4096
# ... on a large cluster more, so that each worker finds several and none waits long for the last ones ...
BLOCKS_PER_WORKER = 4
# ... within what Ray is tested with: 10,000 tasks at a time.
MAX_BLOCKS = 40_000


def map_tasks(
    function: Callable[[int], Any], numbers: Sequence[int], cluster: ClusterConfig
) -> Iterator[tuple[int, Any]]:
    """(number, function(number)) for all numbers, as they finish. Results are JSON values, best small ones.

    The caller has connected to Ray. Raises UserError when a task does or a store fails, OSError(ENOSPC) when a disk is
    full; any other exception of a task arrives as Ray's own, with the remote traceback.
    """
    if not len(numbers):
        return
    import ray.data

    require_room("data_workers", 1, cluster.cpus_per_data_worker)
    limits: dict[str, Any] = {"num_cpus": cluster.cpus_per_data_worker}
    if cluster.memory_bytes_per_data_worker:
        limits["memory"] = cluster.memory_bytes_per_data_worker
    first, step = numbers[0], numbers[1] - numbers[0] if len(numbers) > 1 else 1

    def run(block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU; Ray brings the parallelism
        for index in block["id"]:
            number = first + int(index) * step
            try:
                yield {"number": [number], "result": [json.dumps(function(number))], "failure": [""]}
            except Exception as error:
                if (failure := as_failure(error)) is None:
                    raise
                yield {"number": [number], "result": [""], "failure": [json.dumps(asdict(failure))]}

    workers = cluster.data_workers or most_cpus() / cluster.cpus_per_data_worker
    items = ray.data.range(len(numbers), override_num_blocks=num_blocks(len(numbers), workers))
    pool = ray.data.TaskPoolStrategy(size=cluster.data_workers)
    for row in items.map_batches(run, batch_size=None, compute=pool, **limits).iter_rows():
        if row["failure"]:
            Failure(**json.loads(row["failure"])).raise_again()
        yield int(row["number"]), json.loads(row["result"])


def num_blocks(tasks: int, workers: float) -> int:
    """Into how many blocks so many tasks are cut for so many workers."""
    return min(tasks, MAX_BLOCKS, max(USUAL_BLOCKS, math.ceil(BLOCKS_PER_WORKER * workers)))


class TaskRun:
    """Runs numbered tasks on the cluster, with a progress bar for each step."""

    def __init__(self, cluster: ClusterConfig, progress: bool) -> None:
        self.cluster, self.progress, self.gauges = cluster, progress, TaskGauges()

    def map(
        self, label: str, function: Callable[[int], Any], numbers: Sequence[int]
    ) -> Iterator[tuple[int, Any]]:
        """(number, function(number)) for all numbers, as they finish."""
        bar = tqdm(total=len(numbers), desc=label, unit="task", disable=not self.progress, leave=False)
        with bar:
            self.gauges.show(label, len(numbers), 0)
            for done, (number, result) in enumerate(map_tasks(function, numbers, self.cluster), start=1):
                yield number, result
                bar.update(1)
                self.gauges.show(label, len(numbers), done)

    def step(self, label: str, function: Callable[[int], Any], numbers: Sequence[int]) -> None:
        """Run function(number) for all numbers: a barrier."""
        for _ in self.map(label, function, numbers):
            pass
