"""MLflow's side: a database that several stages make at once, and registered models that are folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llada.errors import UserError
from pipelines.stage.delivery import EXPERIMENT, Delivery, model_folder, open_client

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.integration

STAGE = """
import sys
from pipelines.stage.tracking import tracked
with tracked("sft", sys.argv[1], uri=sys.argv[2]) as tracker:
    tracker.log_metrics({"train.loss": 1.0}, step=1)
"""


def stage(output: Path, uri: str) -> subprocess.Popen[bytes]:
    """A short stage in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", STAGE, str(output), uri], env=env)


def test_stages_that_start_at_once_on_a_fresh_database_keep_their_runs(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    processes = [stage(tmp_path / str(number), uri) for number in range(3)]
    assert [process.wait(240) for process in processes] == [0, 0, 0]
    client = open_client(uri)
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert sorted(Path(run.data.tags["output"]).name for run in runs) == ["0", "1", "2"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.data.metrics["train.loss"] == 1.0 for run in runs)
    assert not list(tmp_path.glob("*/tracking-undelivered.jsonl"))


def test_a_stage_that_is_killed_while_it_makes_the_database_leaves_none_half_made(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    process = stage(tmp_path / "killed", uri)
    for _ in range(2400):
        if list(tmp_path.glob(".mlflow.db.*.tmp")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    assert open_client(uri).search_experiments()


def test_a_registered_model_is_a_folder(tmp_path):
    uri, folder = f"sqlite:///{tmp_path / 'mlflow.db'}", str(tmp_path / "out")
    delivery = Delivery(uri, folder)
    delivery.open("a run", {})
    for _ in range(2):  # the second time nothing is left to do
        delivery(("model", {"name": "tiny-sft", "url": folder, "step": 3}))
    assert [v.source for v in delivery.client.search_model_versions("name = 'tiny-sft'")] == [folder]
    delivery.client.set_registered_model_alias("tiny-sft", "champion", "1")
    for url in ("models:/tiny-sft@champion", "models:/tiny-sft/1", "models:/tiny-sft"):
        assert model_folder(url, uri) == folder
    assert model_folder("s3://bucket/models:/x", uri) == "s3://bucket/models:/x"
    for url in ("models:/tiny-sft@nobody", "models:/tiny-sft/7", "models:/none"):
        with pytest.raises(UserError, match=f"no {url} in MLflow at") as raised:
            model_folder(url, uri)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="there is no MLflow database"):
        model_folder("models:/x", f"sqlite:///{tmp_path / 'none.db'}")


def test_settings_whose_names_mlflow_cannot_take_cost_no_other_its_place(tmp_path):
    delivery = Delivery(f"sqlite:///{tmp_path / 'mlflow.db'}", str(tmp_path / "out"))
    delivery.open("a run", {})
    values = {"seed": "3", "sources.e1[x]/y.weight": "0.5", "sources." + "x" * 300: "1", "long": "y" * 7000}
    delivery(("params", {"values": values}))
    params = delivery.client.get_run(delivery.run_id).data.params
    assert params["seed"] == "3"
    assert params["sources.e1_x__y.weight"] == "0.5"
    assert params[("sources." + "x" * 300)[:250]] == "1"
    assert params["long"] == "y" * 6000
