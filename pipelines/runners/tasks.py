"""Numbered tasks as Ray Data map tasks: what `prepare` does all its work with.

Ray Data reads a range of numbers; the driver holds neither the tasks nor, when they are folded as they come, their
results. A task writes its own output and must be repeatable: Ray starts those of a lost worker again.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from llada.files import is_store_error
from pipelines.stage.artifact import StageError
from pipelines.stage.cluster import ClusterConfig

MAX_BLOCKS = 4096  # Ray Data's bookkeeping is per block: a block of a long list holds many tasks


def map_tasks(
    function: Callable[[int], Any], numbers: Sequence[int], cluster: ClusterConfig
) -> Iterator[tuple[int, Any]]:
    """(number, function(number)) for all numbers, as they finish. Results are JSON values, best small ones.

    The caller has connected to Ray. Raises StageError when a task cannot do its work, OSError(ENOSPC) when a disk is full.
    """
    if not len(numbers):
        return
    import ray.data

    limits: dict[str, Any] = {"num_cpus": cluster.cpus_per_data_worker}
    if cluster.memory_bytes_per_data_worker:
        limits["memory"] = cluster.memory_bytes_per_data_worker
    first, step = numbers[0], numbers[1] - numbers[0] if len(numbers) > 1 else 1

    def run(block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU; Ray brings the parallelism
        for index in block["id"]:
            number = first + int(index) * step
            try:
                yield {"number": [number], "result": [json.dumps(function(number))], "errno": [0]}
            except Exception as error:
                if not is_store_error(error) and not isinstance(error, ValueError | ImportError | StageError):
                    raise
                # As values: through Ray Data an error keeps its text and loses its number.
                code = getattr(error, "errno", None) or -1
                yield {"number": [number], "result": [str(error)], "errno": [code]}

    items = ray.data.range(len(numbers), override_num_blocks=min(len(numbers), MAX_BLOCKS))
    pool = ray.data.TaskPoolStrategy(size=cluster.data_workers)
    for row in items.map_batches(run, batch_size=None, compute=pool, **limits).iter_rows():
        if row["errno"] in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(row["errno"], row["result"])
        if row["errno"]:
            raise StageError(
                f"a task failed: {row['result']}; what is finished is kept, run the command again"
            )
        yield int(row["number"]), json.loads(row["result"])


class TaskRun:
    """Runs numbered tasks on the cluster, with a progress bar for each step."""

    def __init__(self, cluster: ClusterConfig, progress: bool) -> None:
        self.cluster, self.progress = cluster, progress

    def map(
        self, label: str, function: Callable[[int], Any], numbers: Sequence[int]
    ) -> Iterator[tuple[int, Any]]:
        """(number, function(number)) for all numbers, as they finish."""
        bar = tqdm(total=len(numbers), desc=label, unit="task", disable=not self.progress, leave=False)
        with bar:
            for number, result in map_tasks(function, numbers, self.cluster):
                yield number, result
                bar.update(1)

    def step(self, label: str, function: Callable[[int], Any], numbers: Sequence[int]) -> None:
        """Run function(number) for all numbers: a barrier."""
        for _ in self.map(label, function, numbers):
            pass
