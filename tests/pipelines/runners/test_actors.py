"""Blocks on a real Ray: in their order, what is finished is not done again, errors as with tasks."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llada.errors import UserError
from pipelines.runners.actors import map_blocks, require_checkpoint
from pipelines.stage.cluster import ClusterConfig

pytestmark = pytest.mark.integration
BLOCKS = [{"name": f"{i}", "number": i} for i in range(5)]


class Multiplier:
    """Writes down which process did which block, so that a second run can be told from a first."""

    def __init__(self, factor: int, log: str) -> None:
        self.factor, self.log = factor, log

    def __call__(self, block: Any) -> dict[str, int]:
        with open(self.log, "a") as stream:
            stream.write(f"{block['name']}\n")
        return {"product": self.factor * block["number"]}


def run(build: Callable[[], Any], output: Path, actors: int = 1, blocks: Any = BLOCKS) -> list[Any]:
    cluster = ClusterConfig(min_replicas=actors, max_replicas=actors, cpus_per_replica=0.5)
    return list(map_blocks(build, blocks, output=str(output), cluster=cluster, label="test", progress=False))


def test_results_stand_in_order_and_are_made_once(local_ray, tmp_path):
    build = partial(Multiplier, 3, str(tmp_path / "log"))
    results = run(build, tmp_path / "out", actors=2)
    assert [result["product"] for result in results] == [0, 3, 6, 9, 12]
    stored = {file.name.split("-")[0]: file for file in (tmp_path / "out").iterdir()}
    assert json.loads(stored["4"].read_text()) == {"product": 12}
    stored["2"].unlink()
    (tmp_path / "log").unlink()
    # A block that asks something else is another one, whatever its name.
    changed = [*BLOCKS[:3], {"name": "3", "number": 7}, BLOCKS[4]]
    assert [result["product"] for result in run(build, tmp_path / "out", blocks=changed)] == [0, 3, 6, 21, 12]
    # In whichever order Ray hands them out.
    assert sorted((tmp_path / "log").read_text().split()) == ["2", "3"]


class Gated:
    """Is through with two of its block's three units, and waits for the file."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def __call__(self, block: Any, told: Callable[[int], None]) -> int:
        told(2)
        while not self.gate.exists():
            time.sleep(0.05)
        return block["number"]


def test_progress_and_the_time_left_are_told_while_blocks_are_worked_on(
    local_ray: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Behind what an earlier run has done."""
    cluster = ClusterConfig(min_replicas=1, max_replicas=1, cpus_per_replica=0.5)
    options: dict[str, Any] = {"output": str(tmp_path / "out"), "cluster": cluster, "label": "test"}
    (tmp_path / "open").touch()
    done = map_blocks(partial(Gated, tmp_path / "open"), BLOCKS[:1], progress=False, tells=True, **options)
    assert list(done) == [0]
    bars: list[str] = []

    def wait_for(bar: str, gate: Path) -> None:
        deadline, seen = time.monotonic() + 120, ""
        while not re.search(bar, seen) and time.monotonic() < deadline:
            time.sleep(0.1)
            seen += capfd.readouterr().err
        bars.append(seen)
        gate.touch()

    gate = tmp_path / "gate"
    watcher = threading.Thread(target=wait_for, args=(r"5/9 \[\d\d:\d\d<\d\d:\d\d", gate))
    watcher.start()
    told = map_blocks(
        partial(Gated, gate), BLOCKS[:3], progress=True, size=lambda _: 3, tells=True, **options
    )
    assert list(told) == [0, 1, 2]
    watcher.join()
    assert re.search(r"test: .* 5/9 \[\d\d:\d\d<\d\d:\d\d", bars[0]), bars


def no_tokenizer() -> Callable[[Any], Any]:
    raise UserError("m has no tokenizer")


def out_of_range(block: Any) -> int:
    return [0, 1][block["number"]]


def test_errors_of_the_user_and_of_ours(local_ray, tmp_path):
    with pytest.raises(UserError, match="^m has no tokenizer$"):
        run(no_tokenizer, tmp_path / "one")
    with pytest.raises(Exception, match="list index out of range") as raised:
        run(lambda: out_of_range, tmp_path / "two")
    assert not isinstance(raised.value, UserError)
    assert "in out_of_range" in str(raised.value)
    (tmp_path / "three").write_text("a file in the way")
    with pytest.raises(UserError, match="three.*: a file is in the way"):
        run(partial(Multiplier, 3, os.devnull), tmp_path / "three")


def test_a_checkpoint_is_missed_at_once(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        require_checkpoint(str(tmp_path))
