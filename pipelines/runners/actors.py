"""Blocks of work through a Ray Data actor pool, restartable: what `evaluate` and `generate` share.

A block is a small dict with a "name"; its result is written to <output>/<name>.json, and a rerun does what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from llada.files import exists, file_sizes, join, read_bytes, write_bytes
from pipelines.stage.artifact import StageError
from pipelines.stage.cluster import ClusterConfig

Worker = Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]


def require_checkpoint(model: str) -> None:
    """Raises StageError unless a checkpoint folder is there: better here at once than in every actor."""
    if not exists(join(model, "config.json")):
        raise StageError(f"no checkpoint at {model}: there is no config.json")


class _Actor:
    """Builds the worker once, then maps blocks; writes each result before it reports the block as done."""

    def __init__(self, build: Worker, settings: dict[str, Any], output: str) -> None:
        self.worker, self.output = build(settings), output

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        names = []
        for line in batch["block"]:
            block = json.loads(line)
            result = json.dumps(self.worker(block), ensure_ascii=False)
            write_bytes(join(self.output, f"{block['name']}.json"), result.encode())
            names.append(block["name"])
        return {"name": names}


def map_blocks(
    build: Worker,
    blocks: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    *,
    output: str,
    cluster: ClusterConfig,
    label: str,
    progress: bool,
) -> Iterator[dict[str, Any]]:
    """The results of all blocks in their order, computed by `build(settings)` in each actor.

    The caller has connected to Ray. The pool grows from the cluster's min_replicas to its max_replicas.
    """
    import ray.data

    done = set(file_sizes(output))
    todo = [block for block in blocks if f"{block['name']}.json" not in done]
    with tqdm(
        total=len(blocks),
        initial=len(blocks) - len(todo),
        desc=label,
        unit="block",
        disable=not progress,
        leave=False,
    ) as bar:
        if todo:
            items = ray.data.from_items(
                [{"block": json.dumps(block)} for block in todo], override_num_blocks=len(todo)
            )
            mapped = items.map_batches(
                _Actor,
                fn_constructor_args=(build, settings, output),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    min_size=cluster.min_replicas, max_size=max(cluster.min_replicas, cluster.max_replicas)
                ),
                num_cpus=cluster.cpus_per_replica,
                num_gpus=cluster.gpus_per_replica or None,
            )
            for _ in mapped.iter_rows():
                bar.update(1)
    for block in blocks:
        yield json.loads(read_bytes(join(output, f"{block['name']}.json")))
