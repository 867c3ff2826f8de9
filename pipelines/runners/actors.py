"""Blocks of work through a Ray Data actor pool, restartable: what `evaluate` and `generate` share.

A block (llada/evals/evaluation.py) is a small dict with a "name"; its result is written to <output>/<name>-<hash of the block>.json, and a rerun
does what is missing: also a block that has a name of before, and asks something else.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Generic

from tqdm import tqdm

from llada.errors import UserError
from llada.evals.evaluation import B, R
from llada.files import exists, file_sizes, join, read_bytes, write_bytes
from pipelines.runners.channel import Channel
from pipelines.runners.failures import Failure, as_failure
from pipelines.runners.progress import PoolProgress, teller
from pipelines.stage.artifact import config_hash
from pipelines.stage.cluster import ClusterConfig, require_room


def require_checkpoint(model: str) -> None:
    """Raises UserError unless a checkpoint folder is there: better here at once than in every actor."""
    if not exists(join(model, "config.json")):
        raise UserError(f"no checkpoint at {model}: there is no config.json")


class _Actor(Generic[B, R]):
    """Builds the worker once, then maps blocks; writes each result before it reports the block as done."""

    def __init__(self, build: Callable[[], Callable[..., R]], output: str, channel: Channel | None) -> None:
        """`channel`: to which the worker tells how far its block is, by a second argument; None: it has none."""
        self.build, self.output, self.channel = build, output, channel
        self.worker: Callable[..., R] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        failures: list[str] = []
        for line in batch["block"]:
            try:
                self._do(json.loads(line))
            except Exception as error:
                if (failure := as_failure(error)) is None:
                    raise
                failures.append(json.dumps(asdict(failure)))
            else:
                failures.append("")
        return {"failure": failures, "name": batch["name"], "size": batch["size"]}

    def _do(self, block: B) -> None:
        if self.worker is None:  # not in the constructor, whose exceptions Ray turns into an actor's death
            self.worker = self.build()
        told = () if self.channel is None else (teller(self.channel, block["name"]),)
        result = json.dumps(self.worker(block, *told), ensure_ascii=False)
        write_bytes(join(self.output, _result_name(block)), result.encode())


def _result_name(block: B) -> str:
    """Of the file of a block's result: another one for whatever else a block of this name holds."""
    return f"{block['name']}-{config_hash(block)}.json"


def map_blocks(
    build: Callable[[], Callable[..., R]],
    blocks: Sequence[B],
    *,
    output: str,
    cluster: ClusterConfig,
    label: str,
    progress: bool,
    size: Callable[[B], int] = lambda block: 1,
    unit: str = "block",
    tells: bool = False,
) -> Iterator[R]:
    """The results of all blocks in their order, computed by the `build()` of each actor. Progress, and the time that is left,
    are told in units, of which a block has `size`. `tells`: what is built takes a `Told` as its second argument.

    A block holds what its result depends on, as far as the stage's settings and inputs do not say it. The caller has connected to Ray. The pool grows from the cluster's min_replicas to its max_replicas. Raises UserError
    when an actor does, OSError(ENOSPC) when a disk is full.
    """
    import ray.data

    done = set(file_sizes(output))
    todo = [block for block in blocks if _result_name(block) not in done]
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=sum(map(size, blocks)),
                initial=sum(map(size, blocks)) - sum(map(size, todo)),
                desc=label,
                unit=unit,
                disable=not progress,
                leave=False,
            )
        )
        if todo:
            told = PoolProgress(bar)
            channel = stack.enter_context(told.listening()) if tells else None
            low = cluster.min_replicas
            require_room("min_replicas", max(low, 1), cluster.cpus_per_replica, cluster.gpus_per_replica)
            items = ray.data.from_items(
                [{"block": json.dumps(block), "name": block["name"], "size": size(block)} for block in todo],
                override_num_blocks=len(todo),
            )
            mapped = items.map_batches(
                _Actor,
                fn_constructor_args=(build, output, channel),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=low, max_size=max(low, cluster.max_replicas)),
                num_cpus=cluster.cpus_per_replica,
                num_gpus=cluster.gpus_per_replica or None,
            )
            for row in mapped.iter_rows():
                if row["failure"]:
                    Failure(**json.loads(row["failure"])).raise_again()
                told.finish(row["name"], row["size"])
    for block in blocks:
        yield json.loads(read_bytes(join(output, _result_name(block))))
