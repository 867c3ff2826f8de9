"""track: what stages could not deliver arrives, once; what MLflow still does not take stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.stage.artifact import UNDELIVERED_FILE, open_output, read_manifest
from pipelines.stage.delivery import EXPERIMENT, open_client
from pipelines.stage.tracking import tracked

pytestmark = pytest.mark.integration


@pytest.fixture
def away(free_port: Callable[[], int]) -> str:
    """The address of a server that is not there."""
    return f"http://127.0.0.1:{free_port()}"


def test_what_is_left_is_delivered_once(llada, tmp_path, tracking_uri, monkeypatch, away):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("first", "second"):
        output = str(tmp_path / name)
        folder = open_output(output, stage="sft", config={}, inputs=[])
        with tracked("sft", output, uri=away, preset="tiny") as tracker:
            tracker.log_metrics({"train.loss": 1.0}, step=1)
            folder.finish({}, kind="checkpoint")
        assert Path(output, UNDELIVERED_FILE).exists()
    code, _, err = llada("track", str(tmp_path), "--tracking-uri", away)
    assert (code, len(err.strip().splitlines())) == (1, 1)
    kept = Path(tmp_path, "first", UNDELIVERED_FILE).read_bytes()
    assert llada("track", str(tmp_path))[0] == 0
    client = open_client(tracking_uri)
    Path(tmp_path, "first", UNDELIVERED_FILE).write_bytes(
        kept
    )  # as if the command had been killed at its end
    assert llada("track", str(tmp_path))[0] == 0
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert len(runs) == 2
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.info.run_name.startswith("sft tiny ")
        assert len(client.get_metric_history(run.info.run_id, "train.loss")) == 1
        assert read_manifest(run.data.tags["output"])["mlflow_run_id"] == run.info.run_id
    assert not list(tmp_path.glob(f"*/{UNDELIVERED_FILE}"))
    assert "everything is delivered" in llada("track", str(tmp_path / "first"))[1]


def test_what_is_not_taken_stays_and_a_damaged_line_is_named(llada, tmp_path, tracking_uri, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    file = tmp_path / "out" / UNDELIVERED_FILE
    file.parent.mkdir()
    calls = [
        {"call": "tags", "values": {"fine": "yes"}},
        {"call": "artifact", "url": str(tmp_path / "no-such-file")},
    ]
    file.write_text("".join(json.dumps(call) + "\n" for call in calls))  # without a first line, as older ones
    code, out, err = llada("track", str(tmp_path / "out"))
    assert code == 1
    assert "1 calls are left" in out
    assert "no-such-file" in err
    assert [json.loads(line)["call"] for line in file.read_text().splitlines()] == ["artifact"]
    file.write_text("{\n")
    code, _, err = llada("track", str(tmp_path / "out"))
    assert code == 1
    assert f"{file}:1 is no call" in err


def test_a_folder_that_is_not_there_is_not_delivered(llada, tmp_path):
    none = f"{tmp_path}/none"
    assert llada("track", none) == (1, "", f"llada track: there is no folder {none}\n")
    assert llada("track", str(tmp_path)) == (0, f"{tmp_path}: everything is delivered\n", "")
