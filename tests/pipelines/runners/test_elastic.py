"""A training whose machines come and go: the same samples with the same masks, whoever computes them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from llada.data.tokens.shards import TokenDataset
from llada.settings import to_json
from llada.training.batches import BatchStream
from pipelines.stage.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.integration


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("plan", ["2,1", "2,1,3,2"])
def test_samples_and_masks_do_not_depend_on_which_machines_are_there(stages, tmp_path, monkeypatch, plan):
    script = Path(__file__).with_name("elastic_run.py")
    (tmp_path / "recipe.json").write_text(to_json(stages.recipe))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(script.parent)]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",  # off for the one machine of these tests
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
        # A node that is gone is found out so fast.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), stages.data, plan],
        env=environment,
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    numbers = [int(number) for number in plan.split(",")]
    num_steps = 7 * len(numbers)
    assert done.stdout.strip().splitlines()[-1:] == [f"steps {num_steps}"], done.stdout + done.stderr

    trained: dict[int, dict[int, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    lines = [json.loads(path.read_text()) for path in sorted((tmp_path / "rows").glob("*.json"))]
    for line in lines:
        rows = trained[line["step"]][line["workers"]]
        for slot, checksum in line["rows"]:
            assert rows.setdefault(slot, checksum) == checksum
    run = stages.recipe.pretrain
    dataset = TokenDataset(stages.data)
    global_rows = run.train.global_batch_tokens // dataset.row_length
    monkeypatch.syspath_prepend(str(script.parent))
    from elastic_run import rows_of

    alone = BatchStream(
        dataset,
        run.objective,
        stages.recipe.model,
        global_rows=global_rows,
        micro_rows=run.train.micro_batch_rows,
        seed=run.train.seed,
        rank=0,
        num_workers=1,
    )
    for step in range(num_steps):
        expected = dict(rows_of(alone, step))
        assert len(expected) == global_rows
        complete = [workers for workers, rows in trained[step].items() if rows == expected]
        assert complete, step
        for rows in trained[step].values():
            assert rows.items() <= expected.items()
    seen = [line["workers"] for line in lines]
    changes = [number for i, number in enumerate(seen) if i == 0 or number != seen[i - 1]]
    assert changes == numbers
    assert [event.step for event in read_metrics(str(tmp_path / "out")) if event.name == "step"] == list(
        range(1, num_steps + 1)
    )
    # Lost without a word, a machine costs the steps since the checkpoint; with a notice, or for one that comes, none.
    groups = [
        [line["step"] for line in group]
        for _, group in itertools.groupby(lines, lambda line: line["workers"])
    ]
    for before, after, old, new in zip(groups, groups[1:], numbers, numbers[1:], strict=False):
        is_without_a_word = old > new and before is groups[0]
        assert min(after) == (4 if is_without_a_word else max(before) + 1)
