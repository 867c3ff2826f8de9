"""`python elastic_run.py FOLDER DATA PLAN`: trains on several Ray nodes of this machine, each with room for one worker, while
they come and go: with as many workers as PLAN says ("2,1,3"), one number after the other.

Each worker writes to FOLDER/rows what it trains on, a line for each row of each step.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
import traceback
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import reset_ray_address
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from llada.data.tokens.shards import load_unigram_counts
from llada.training import trainer
from llada.training.batches import BatchStream
from llada.training.trainer import TrainResult
from pipelines.runners.workers import WorkerHooks, run_workers
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.own_ray import PATIENT, patient_start

STEPS_EACH = 7
CHECKPOINT_EVERY = 4


def rows_of(stream: BatchStream, step: int) -> list[tuple[int, int]]:
    """(slot in the global batch, checksum of tokens and masks) of a worker's rows of a step."""
    batch, prepared = stream.load(step), stream.prepare(step)
    slots = batch.slots.tolist()
    noised = [row for micro in prepared.micro for row in micro.tokens.numpy()]
    clean = batch.tokens.numpy()
    return [
        (slot, zlib.crc32(clean[i].tobytes() + noised[i].tobytes()))
        for i, slot in enumerate(slots)
        if bool(batch.maskable[i].any())
    ]


def elastic_worker(configs: Any, data: str, folder: Path, plan: list[int], hooks: WorkerHooks) -> TrainResult:
    """Trains; where the next number of workers is due, waits until the machines have changed."""

    class Recorded(BatchStream):
        def batches(self, first_step: int, last_step: int, **options: Any) -> Any:
            for batch in super().batches(first_step, last_step, **options):
                place = folder / "rows" / f"{time.time_ns()}-{self.rank}.json"
                line = {"step": batch.step, "workers": self.num_workers, "rows": rows_of(self, batch.step)}
                place.with_suffix(".tmp").write_text(json.dumps(line))
                os.replace(place.with_suffix(".tmp"), place)
                phase = min(batch.step // STEPS_EACH, len(plan) - 1)
                is_over = phase > 0 and self.num_workers == plan[phase - 1]
                while is_over and not hooks.should_stop():
                    (folder / f"phase-{phase}").touch()
                    time.sleep(0.05)
                yield batch

    trainer.BatchStream = Recorded  # type: ignore[misc]
    return trainer.train(
        *configs,
        data,
        checkpoints=str(folder / "out" / "checkpoints"),
        unigram_counts=load_unigram_counts(data),
        report=hooks.report,
        should_stop=hooks.should_stop,
        enter=hooks.enter,
    )


def change_nodes(cluster: Cluster, nodes: list[Any], folder: Path, plan: list[int]) -> None:
    """Gives and takes nodes as the phases come: nodes are lost without a word, but the last ones with a notice."""
    for phase, (before, number) in enumerate(itertools.pairwise(plan), start=1):
        while not (folder / f"phase-{phase}").exists():
            time.sleep(0.05)
        for _ in range(number - before):
            with patient_start():
                nodes.append(cluster.add_node(num_cpus=1))
        for _ in range(before - number):
            node = nodes.pop()
            if phase == 1:
                cluster.remove_node(node, allow_graceful=False)
            else:
                client = ray._raylet.GcsClient(address=cluster.address)
                reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
                deadline_ms = int(time.time() * 1000) + 120_000
                client.drain_node(node.node_id, reason, "spot", deadline_ms)


def main() -> None:
    folder, data, plan = Path(sys.argv[1]), sys.argv[2], [int(number) for number in sys.argv[3].split(",")]
    (folder / "rows").mkdir()
    configs = json_configs(folder)
    os.environ.update(PATIENT)
    with patient_start():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(plan[0] - 1)]
        cluster.wait_for_nodes(timeout=300)
    reset_ray_address()  # written for the whole machine: whoever joins a Ray without an address would look for this one
    config = ClusterConfig(
        address=cluster.address, num_workers=(1, 3), resize_every_s=1, max_failures=1, hang_timeout_s=600
    )
    function = partial(elastic_worker, configs, data, folder, plan)

    def run() -> None:
        try:
            result = run_workers(
                function,
                output=str(folder / "out"),
                cluster=config,
                tracker=None,
                label="toy",
                progress=False,
            )
            print("steps", result.num_steps, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)

    threading.Thread(target=run, daemon=True).start()
    change_nodes(cluster, nodes, folder, plan)  # a node sets handlers of signals: only the main thread may
    threading.Event().wait()


def json_configs(folder: Path) -> Any:
    """The network and the run in FOLDER/recipe.json, as long as the plan."""
    from llada.config import Recipe
    from llada.settings import from_json

    recipe = from_json(Recipe, (folder / "recipe.json").read_text())
    plan = sys.argv[3].split(",")
    run = replace(
        recipe.pretrain.train,
        num_steps=STEPS_EACH * len(plan),
        checkpoint_every=CHECKPOINT_EVERY,
        validate_every=1000,
        log_every=1,
    )
    return recipe.model, replace(recipe.pretrain, train=run)


if __name__ == "__main__":
    # So that the workers, which import this file under its own name, are sent its functions by name.
    sys.path.insert(0, str(Path(__file__).parent))
    import elastic_run

    elastic_run.main()
