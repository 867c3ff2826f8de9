"""The benchmarks of training run, at sizes whose figures mean nothing: also where nobody has a GPU, their checks are made."""

from __future__ import annotations

import importlib
import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llada.diffusion import cross_entropy

pytestmark = pytest.mark.integration  # for its length: blocks are compiled


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize("minutes", ["0", pytest.param("7", marks=pytest.mark.slow)])
def test_gpu_train_makes_its_checks_and_runs_every_path_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: str
) -> None:
    """In no minutes it makes its checks alone; smaller ones, and what they would compile runs as it is."""
    if is_short := minutes == "0":
        monkeypatch.setitem(cross_entropy.SLICE, "cpu", 1 << 20)
    arguments = [
        "gpu_train.py",
        "--device",
        "cpu",
        "--quick",
        "--minutes",
        minutes,
        "--results",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    with torch.compiler.set_stance("force_eager" if is_short else "default"):
        assert importlib.import_module("gpu_train").main() == 0
    report = json.loads((tmp_path / "gpu_train.json").read_text())
    assert report["checks"]["resume"]["bit_for_bit"]
    rows = report["networks"]["small"]["results"]
    assert len(rows) + len(report["networks"]["small"]["left_out"]) == 4
    assert (rows == []) == (minutes == "0")
    assert all(math.isfinite(row["last_loss"]) and 0 < row["mfu_done"] < row["mfu"] for row in rows)


def test_a_step_is_compared_with_the_plain_way(tmp_path: Path) -> None:
    training = importlib.import_module("training")
    setting = training.Setting(512, "float32", 64, 1, 2, 32, 1)
    result = training.race(setting, setting.write_data(tmp_path), ["plain", "ours"], turns=1, steps=1)
    assert result["ours"]["same_as_plain"]["gradient_error"] < 1e-5
    assert training.measure_memory("ours", setting) > 0


def setting() -> Any:
    return importlib.import_module("ray_overhead").Setting(64, 1, 2, 32, steps=2)


def test_a_run_says_what_its_start_and_its_turns_have_used(tmp_path: Path) -> None:
    overhead = importlib.import_module("ray_overhead")
    (tmp_path / "data").mkdir()
    overhead.write_folder(tmp_path / "data", setting())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        job = overhead.Job("plain", setting(), 1, str(tmp_path / "data"), str(tmp_path / "out"), port)
        with overhead.running(server, job) as lines:
            start = overhead._heard(lines)["turn"]
            overhead._go_on(lines)
            began = time.monotonic()
            overhead._heard(lines)
            time.sleep(1)
            overhead._go_on(lines)
            heard = overhead._heard(lines)
            elapsed_s = time.monotonic() - began
            turn, wait = heard["turn"], heard["wait"]
    assert start.worker > turn.worker > 0
    assert 0 < turn.seconds < start.seconds
    # It looks at its clock after it has told us, which may be some time later.
    assert 0.2 < wait.seconds < elapsed_s + 0.1
    assert wait.worker < 0.05  # who has no turn does nothing
    assert start.others == turn.others == wait.others == {}


def test_what_ray_adds_is_a_part_of_what_the_plain_run_takes() -> None:
    overhead = importlib.import_module("ray_overhead")

    def used(worker: float, **others: float) -> Any:
        return overhead.Used(4.0, worker, others)

    turns = [
        {"plain": used(2.0), "ray": used(2.0 + extra, driver=0.1, raylet=0.1)} for extra in (0, 0.02, 0.5)
    ]
    turns[2]["ray"] = used(2.5, driver=0.06, raylet=0.1, gcs_server=0.04)
    waits = [{"ray": used(0.04, raylet=0.02)}, {"ray": used(0.02, raylet=0.02, driver=0.06)}]
    found = overhead.summary({"turn": turns, "wait": waits, "start": turns}, steps=2)
    counted = found["counted"]
    assert counted["cores_by_process"] == pytest.approx({"worker": 0.0075, "driver": 0.0075, "raylet": 0.005})
    assert counted["cores"] == pytest.approx(0.02)
    assert counted["of_a_step"] == pytest.approx(0.04)  # the plain run keeps half a core busy
    assert found["step"]["plain_cpu_s"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert found["step"]["added_in_worker"]["median"] == pytest.approx(0.01)
    assert found["step"]["added_in_all"]["median"] == pytest.approx(0.11)
    assert found["step"]["ray_others_cores"]["median"] == pytest.approx(0.05)
    by_process = found["step"]["ray_cores_by_process"]
    assert {name: used["median"] for name, used in by_process.items()} == pytest.approx(
        {"driver": 0.025, "raylet": 0.025, "gcs_server": 0}
    )
    assert by_process["gcs_server"]["most"] == pytest.approx(0.01)
    assert found["start"]["ray"]["cpu_s"]["most"] == pytest.approx(2.7)


@pytest.mark.slow
def test_ray_is_compared_with_a_plain_run(tmp_path: Path) -> None:
    script = Path(__file__).with_name("ray_overhead.py")
    subprocess.run([sys.executable, script, "--quick", "--results", tmp_path], check=True)
    report = json.loads((tmp_path / "ray_overhead.json").read_text())
    assert len(report["measured"]["turn"]) == 2
    for used in (report["step"]["ray_cores_by_process"], report["start"]["ray"]["cpu_s_by_process"]):
        assert {"driver", "raylet", "gcs_server"} <= used.keys()
    assert report["start"]["plain"]["cpu_s_by_process"] == {}
