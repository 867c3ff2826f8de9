"""The benchmarks of training run, at sizes whose figures mean nothing: also where nobody has a GPU, their checks are made."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration  # for its length: blocks are compiled


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_gpu_train_runs_every_path_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["gpu_train.py", "--device", "cpu", "--quick", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert importlib.import_module("gpu_train").main() == 0
    report = json.loads((tmp_path / "gpu_train.json").read_text())
    assert report["checks"]["resume"]["bit_for_bit"]
    rows = report["networks"]["small"]["results"]
    assert len(rows) + len(report["networks"]["small"]["left_out"]) == 4
    assert all(math.isfinite(row["last_loss"]) and 0 < row["mfu_done"] < row["mfu"] for row in rows)


def test_a_step_is_compared_with_the_plain_way(tmp_path: Path) -> None:
    training = importlib.import_module("training")
    setting = training.Setting(512, "float32", 64, 1, 2, 32, 1)
    result = training.race(setting, setting.write_data(tmp_path), ["plain", "ours"], turns=1, steps=1)
    assert result["ours"]["same_as_plain"]["gradient_error"] < 1e-5
    assert training.measure_memory("ours", setting) > 0
