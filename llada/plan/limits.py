"""What our own machinery has to do at a given size: drivers, queues, listings, requests to the store, checkpoint keys, MLflow.

Each demand is a figure read off the code that makes it, beside a limit that is measured, documented or follows from the
settings. What is above its limit breaks, the highest share first; its remedy is a setting. A demand without a limit is told
because it grows.
"""

from __future__ import annotations

from dataclasses import dataclass

from llada.config import Recipe
from llada.data.report.cost import Cluster, Prices, estimate_cost
from llada.plan.checkpoints import METADATA_BYTES, STORE_RATES, CheckpointPlan
from llada.plan.corpus import FAST, with_work
from llada.plan.training import TrainingCost

# The store: S3's documented rates under one prefix ("Best practices design patterns"), and what a request takes.
READS_PER_S, WRITES_PER_S = Cluster.reads_per_s, Cluster.writes_per_s
REQUEST_S = 0.03
LISTED_PER_PAGE, PAGE_S = 1000, 0.1
# Ray's tested envelope (release/benchmarks/README.md of ray-project/ray): nodes, actors, tasks that run at a time.
RAY_NODES, RAY_ACTORS, RAY_TASKS = 2000, 40_000, 10_000
# A driver, measured: tests/benchmarks/results/prepare_scale.json, 100,000 units.
DRIVER_TASKS_PER_S, DRIVER_BYTES = 1584.0, 190 * 2**20
# Range reads of a row (llada/data/tokens/shards.py): its offsets; its segments and its tokens.
READS_PER_ROW = 3
_INDEX_ENTRY_BYTES = 200  # of a shard: name, checksum, counts
_FILES_PER_WORKER = 4  # of a checkpoint in a remote store (llada/training/checkpoint/tensors.py)
_UNIT_BYTES = 64 << 20
_UNITS_PER_GROUP = 256
_SEEN_BYTES = 16  # of each file of earlier snapshots (llada/data/work/units.py)
_STATE_ENTRY_BYTES = 60  # of a file in state.json: its name, size and checksum
_LINE_BYTES = 700  # of a logged step in metrics.jsonl
_ERROR_BYTES = 6000  # what a worker says of a failure, its traceback included
_INTERPRETER_SHARE = 0.1  # that a thread of worker 0 may take from its steps


@dataclass(frozen=True)
class Drivers:
    """Settings of the code around Ray and MLflow, as it has them."""

    data_blocks: int
    """Tasks into which Ray Data cuts a step of a preparation, at the most."""
    metrics_every_s: float
    """Between two writes of a training's record."""
    part_lines: int
    """Lines of it that are written again each time."""
    buffered_calls: int
    """To MLflow, that wait while it is away."""
    events_every_s: float
    """Between two looks of Ray Train's controller at all workers."""


@dataclass(frozen=True)
class Demand:
    """What one part of the machinery has to do."""

    room: str
    """prepare or pretrain."""
    what: str
    amount: float
    unit: str
    limit: float | None = None
    remedy: str = ""

    @property
    def share(self) -> float:
        """Of the limit; 0 without one."""
        return self.amount / self.limit if self.limit else 0.0


def first_to_break(demands: list[Demand]) -> list[Demand]:
    """What is above its limit, the highest share first."""
    return sorted((demand for demand in demands if demand.share > 1), key=lambda demand: -demand.share)


def prepare_demands(tokens: float, cluster: Cluster, drivers: Drivers) -> list[Demand]:
    """Of preparing so many tokens on a cluster of CPUs."""
    cost = estimate_cost(tokens, FAST, Prices(), with_work(cluster, drivers.data_blocks))
    units = max(1.0, cost.text_bytes * FAST.stored_ratio / _UNIT_BYTES)
    cores, groups = cluster.nodes * cluster.cores, -(-units // _UNITS_PER_GROUP)
    running = min(cores, units, drivers.data_blocks)
    # What the longest step gives each core to do, which is what the driver hears of.
    unit_s = sum(cost.core_hours[step] for step in ("read", "filter", "minhash")) * 3600 / units
    requests, rest = (
        sum(hours(stage.limits) for stage in cost.stages)
        for hours in (lambda limits: limits["requests"], lambda limits: max(limits["cpu"], limits["network"]))
    )

    def demand(what: str, amount: float, unit: str, limit: float | None = None, remedy: str = "") -> Demand:
        return Demand("prepare", what, amount, unit, limit, remedy)

    parts = -(-cores // drivers.data_blocks)
    return [
        demand("nodes of one Ray cluster", cluster.nodes, "nodes", RAY_NODES, "several clusters, a part of the input each"),
        demand(
            "cores for Ray Data's blocks", min(cores, units), "cores", drivers.data_blocks,
            f"the rest stand idle: fewer nodes, or {parts} parts of the input, each into its own output (not deduplicated against each other)",
        ),
        demand("tasks that run at a time", running, "tasks", RAY_TASKS, "a larger unit_bytes and cpus_per_data_worker"),
        demand("finished tasks at the driver", running / unit_s, "a second", DRIVER_TASKS_PER_S, "a larger unit_bytes"),
        demand(
            "requests to the store, as fast as it takes them", requests * 3600, "s", rest * 3600,
            "longer than all the rest: a larger dedup.rows_per_task, with more memory a task, or fewer nodes",
        ),
        demand(
            "listing the input again at each run", units / LISTED_PER_PAGE * PAGE_S, "s", 3600.0,
            "give the new files as an @list",
        ),
        demand("the driver's sums at the end", groups * 3 * REQUEST_S, "s", 3600.0, "a larger unit_bytes"),
        demand("memory of the driver", DRIVER_BYTES + units * _SEEN_BYTES, "bytes", 4 * 2.0**30, "a larger head node"),
        demand("tasks of a step", units, "units"),
    ]  # fmt: skip


def train_demands(
    recipe: Recipe,
    cost: TrainingCost,
    checkpoints: CheckpointPlan,
    drivers: Drivers,
    *,
    unique_tokens: float,
    gpus_per_node: int,
    interval_s: float,
) -> list[Demand]:
    """Of training on so many GPUs, with a checkpoint every `interval_s` seconds."""
    train, workers, length = recipe.pretrain.train, cost.gpus, recipe.prepare.row_length
    nodes, rows = -(-workers // gpus_per_node), train.global_batch_tokens // length
    step_s = train.global_batch_tokens / (cost.tokens_per_second_per_gpu * workers)
    fed = -(-rows // workers) * workers
    files = _FILES_PER_WORKER * workers + 2
    shard_files = unique_tokens / length / recipe.prepare.rows_per_shard
    logged = 1 / (train.log_every * step_s)
    one_node = f"train.shard_workers {gpus_per_node}: the shards of one node"

    def demand(what: str, amount: float, unit: str, limit: float | None = None, remedy: str = "") -> Demand:
        return Demand("pretrain", what, amount, unit, limit, remedy)

    return [
        demand("nodes of one Ray cluster", nodes, "nodes", RAY_NODES, "fewer, larger nodes"),
        demand("actors", workers, "actors", RAY_ACTORS, "fewer workers"),
        demand(
            "workers for the rows of a batch", workers, "workers", rows,
            f"train.global_batch_tokens {workers * length:,}, or at most {rows:,} GPUs: the rest fill up",
        ),
        demand(
            "reads of rows from the store", fed * READS_PER_ROW / step_s, "a second", READS_PER_S,
            "copy the shards to a disk of each node: local ones are mapped, not fetched",
        ),
        demand("bytes of rows", fed * length * 4 / step_s, "bytes a second", nodes * STORE_RATES[0], "copy the shards to a disk of each node"),
        demand(
            "worker 0's plan of a checkpoint, beside its steps", checkpoints.plan, "s", _INTERPRETER_SHARE * interval_s,
            f"a larger train.checkpoint_every, and {one_node}",
        ),
        demand("worker 0's memory for that plan", checkpoints.plan_bytes, "bytes", 32 * 2.0**30, one_node),
        demand(
            "what each node reads of its .metadata to go on", min(workers, gpus_per_node) * checkpoints.shards * METADATA_BYTES,
            "bytes", STORE_RATES[0] * 60, one_node,
        ),
        demand(
            "keys of a checkpoint, as fast as the store takes them", files / WRITES_PER_S, "s", interval_s,
            "a larger train.checkpoint_every",
        ),
        demand("state.json", files * _STATE_ENTRY_BYTES, "bytes"),
        demand(
            "the list of shards, on each node", gpus_per_node * shard_files * _INDEX_ENTRY_BYTES, "bytes",
            64 * 2.0**30, "a larger prepare.rows_per_shard",
        ),
        demand("calls of MLflow, one a logged step", logged, "a second"),
        demand(
            "MLflow may be away, before calls are dropped", drivers.buffered_calls / logged / 3600, "hours",
        ),
        demand(
            "the record, its last part again each time",
            min(drivers.part_lines, drivers.metrics_every_s * logged + drivers.part_lines / 2) * _LINE_BYTES / drivers.metrics_every_s,
            "bytes a second",
        ),
        demand("what all workers say when one fails", workers * _ERROR_BYTES, "bytes"),
        demand("looks of Ray Train's controller at workers", workers / drivers.events_every_s, "a second"),
    ]  # fmt: skip
