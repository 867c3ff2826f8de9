"""MLflow on a real sqlite store; a server that is away; one that comes back."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import re
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.stage.artifact import open_output, read_manifest
from pipelines.stage.delivery import EXPERIMENT, open_client
from pipelines.stage.tracking import Tracker, default_tracking_uri, tracked

mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.integration


def await_metric(client: Any, run_id: str, prefix: str) -> None:
    """Until the run has one of that name: before the stage ends, which gives up on everything."""
    deadline = time.monotonic() + 120
    while not any(name.startswith(prefix) for name in client.get_run(run_id).data.metrics):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_holds_parameters_metrics_inputs_and_artifacts(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")  # seconds; MLflow's own setting
    output = str(tmp_path / "out")
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"picture")
    with tracked("pretrain", output) as tracker:
        tracker.log_params({"optim": {"lr": 1e-3, "betas": (0.9, 0.95)}, "long": "x" * 10_000})
        for step in (1, 2, 3):
            tracker.log_metrics({"train.loss": 1 / step}, step=step)
        tracker.log_input(
            "s3://bucket/data", context="data", manifest={"config_hash": "abc", "mlflow_run_id": "parent"}
        )
        tracker.log_artifact(picture)
        run_id = tracker.wait_started(200)
        assert run_id
        client = mlflow.MlflowClient(default_tracking_uri(output))
        await_metric(client, run_id, "system/")
    assert default_tracking_uri(output) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.001"
    assert len(run.data.params["long"]) == 6000
    history = client.get_metric_history(run.info.run_id, "train.loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.data.tags["input.data.run_id"] == "parent"
    assert run.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["loss.png"]
    assert any(name.startswith("system/") for name in run.data.metrics)
    assert [p.name for p in Path(output).iterdir()] == ["tracking.json"]


def test_a_failed_stage_is_a_failed_run(tmp_path, tracking_uri, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = str(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), tracked("sft", output) as tracker:
        tracker.log_params({"a": 1})
        assert tracker.wait_started(200)
        raise ZeroDivisionError
    client = mlflow.MlflowClient(default_tracking_uri(output))
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert run.info.status == "FAILED"


def test_an_unreachable_server_stops_nothing_and_loses_nothing(tmp_path, free_port):
    started = time.perf_counter()
    tracker = Tracker(f"http://127.0.0.1:{free_port()}", "pretrain", str(tmp_path))
    for step in range(100):
        tracker.log_metrics({"train.loss": 1.0}, step=step)
    # Each of them would wait for RETRY_S at least, and all for some minutes.
    assert time.perf_counter() - started < 30, "logging must not wait for the server"
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "tracking-undelivered.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["call"] == "metrics"] == list(range(100))


def test_a_stage_that_goes_on_continues_its_run_and_a_finished_one_makes_none(
    tmp_path, tracking_uri, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = str(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), tracked("sft", output) as tracker:
        tracker.log_metrics({"train.loss": 2.0}, step=1)
        assert tracker.wait_started(200)
        raise ZeroDivisionError
    with tracked("sft", output) as tracker:
        tracker.log_metrics({"train.loss": 1.0}, step=2)
    with tracked("sft", output):
        pass  # finished: the stage logs nothing
    client = mlflow.MlflowClient(default_tracking_uri(output))
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train.loss")] == [1, 2]


def test_a_run_that_was_deleted_is_not_continued(tmp_path, tracking_uri, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = str(tmp_path / "out")
    client = mlflow.MlflowClient(default_tracking_uri(output))
    ids = []
    for _ in range(2):
        with tracked("sft", output) as tracker:
            tracker.log_metrics({"train.loss": 1.0}, step=1)
            ids.append(tracker.wait_started(200))
        client.delete_run(ids[-1])
    assert None not in ids
    assert len(set(ids)) == 2


def test_a_call_that_fails_by_our_fault_holds_nothing_up(tmp_path, tracking_uri, caplog):
    """It is warned of at once and kept for the file; what comes after it is delivered."""
    output, uri = str(tmp_path / "out"), tracking_uri
    with caplog.at_level(logging.WARNING), tracked("sft", output, uri=uri) as tracker:
        tracker.set_tags({("no", "name"): "value"})  # a TypeError, which MLflow's database wraps
        tracker.log_input(Path("no-url"), context="data")  # a TypeError
        tracker.log_artifact(str(tmp_path / "no-such-file"))
        tracker.log_metrics({"train.loss": 1.0}, step=1)
        run_id = tracker.wait_started(200)
        client = mlflow.MlflowClient(uri)
        await_metric(client, run_id, "train.loss")
        assert [m.value for m in client.get_metric_history(run_id, "train.loss")] == [1.0]
        warnings = [record.message for record in caplog.records]
        for failed in (
            "MLflow call tags failed: MlflowException: expected string",
            "MLflow call input failed: TypeError",
            "MLflow call artifact failed: FileNotFoundError",
        ):
            assert any(text.startswith(failed) for text in warnings), warnings
    assert client.get_run(run_id).info.status == "FINISHED"
    lines = (tmp_path / "out" / "tracking-undelivered.jsonl").read_text().splitlines()
    assert [json.loads(line)["call"] for line in lines] == ["tags", "input", "artifact"]


class _Denying(http.server.BaseHTTPRequestHandler):
    """Answers 403 to whatever is to be stored."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_what_the_store_of_artifacts_refuses_holds_nothing_up(
    tmp_path, tracking_uri, caplog, monkeypatch, scheme
):
    output, uri = str(tmp_path / "out"), tracking_uri
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Denying) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}"
        for name, value in (
            ("MLFLOW_S3_ENDPOINT_URL", f"http://{place}"),
            ("AWS_ACCESS_KEY_ID", "a"),
            ("AWS_SECRET_ACCESS_KEY", "b"),
        ):
            monkeypatch.setenv(name, value)
        location = {"s3": "s3://bucket/runs", "http": f"http://{place}/runs"}[scheme]
        client = open_client(uri)
        client.create_experiment(EXPERIMENT, artifact_location=location)
        with caplog.at_level(logging.WARNING), tracked("sft", output, uri=uri) as tracker:
            (tmp_path / "loss.png").write_bytes(b"picture")
            tracker.log_artifact(tmp_path / "loss.png")
            tracker.log_metrics({"train.loss": 1.0}, step=1)
            run_id = tracker.wait_started(200)
            await_metric(client, run_id, "train.loss")
            assert [m.value for m in client.get_metric_history(run_id, "train.loss")] == [1.0]
        server.shutdown()
    assert [record.message for record in caplog.records if "403" in record.message]
    (line,) = (tmp_path / "out" / "tracking-undelivered.jsonl").read_text().splitlines()
    assert json.loads(line)["call"] == "artifact"


def test_stages_are_runs_with_links(stages):
    client = mlflow.MlflowClient(default_tracking_uri(stages.pretrained))
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    by_output = {Path(run.data.tags["output"]).name: run for run in runs}
    assert set(by_output) == {"data", "pretrained", "sft_data", "model"}
    assert all(run.info.status == "FINISHED" for run in runs)
    pretrained = by_output["pretrained"]
    assert pretrained.data.params["model.d_model"] == "32"
    assert pretrained.data.metrics["validation.loss"] > 0
    assert pretrained.data.tags["input.data.run_id"] == by_output["data"].info.run_id
    assert by_output["data"].data.metrics["train_tokens"] > 0
    assert by_output["data"].inputs.dataset_inputs[0].dataset.name.endswith("text.jsonl")
    assert by_output["model"].data.tags["input.model.run_id"] == pretrained.info.run_id
    artifacts = {
        name: {a.path for a in client.list_artifacts(r.info.run_id)} for name, r in by_output.items()
    }
    assert artifacts["data"] == {"manifest.json", "report.html"}
    written = {"manifest.json", "loss.png", "loss_by_noise.png", "metrics.jsonl", "samples"}
    assert artifacts["model"] == written


def test_what_could_not_be_delivered_is_delivered_by_the_next_attempt(
    tmp_path, tracking_uri, caplog, free_port
):
    """A server that is away, then the same output with one that is there: nothing is lost, nothing comes twice."""
    output, uri = str(tmp_path / "out"), tracking_uri
    with tracked("sft", output, uri=f"http://127.0.0.1:{free_port()}") as tracker:
        tracker.log_metrics({"train.loss": 2.0}, step=1)
        assert tracker.wait_started() is None
    assert f"`llada track {output}`" in caplog.text
    with tracked("sft", output, uri=uri) as tracker:
        tracker.log_metrics({"train.loss": 1.0}, step=2)
    assert not Path(output, "tracking-undelivered.jsonl").exists()
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train.loss")] == [1, 2]


def test_a_run_is_told_from_others_and_links_both_ways(tmp_path, tracking_uri, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = tracking_uri
    folder = open_output("out", stage="sft", config={"lr": 1}, inputs=[])
    with tracked("sft", "out", uri=uri, preset="tiny") as tracker:
        tracker.log_params({"lr": 1, "unset": None})
        tracker.log_input("data", context="data")
        folder.finish({}, kind="checkpoint")  # before MLflow has given a run
        tracker.log_model(str(tmp_path / "out"), step=3)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert re.fullmatch(r"sft tiny out \d{4}-\d\d-\d\d \d\d:\d\d", run.info.run_name)
    assert run.data.params == {"lr": "1"}
    tags = run.data.tags
    assert (tags["output"], tags["preset"], tags["stage"]) == (str(tmp_path / "out"), "tiny", "sft")
    assert tags["input.data"] == str(tmp_path / "data")
    assert tags["git_commit"] == tags["mlflow.source.git.commit"]
    assert read_manifest("out")["mlflow_run_id"] == run.info.run_id
    assert tags["model"] == "models:/tiny-sft/1"
    (logged,) = run.outputs.model_outputs
    assert client.get_logged_model(logged.model_id).tags["source"] == str(tmp_path / "out")


def test_a_database_of_another_version_is_one_line_with_the_remedy(tmp_path, tracking_uri, caplog):
    uri = tracking_uri  # which this process has not opened yet
    with contextlib.closing(
        sqlite3.connect(tmp_path / "mlflow.db")
    ) as database:  # as a migration that was killed leaves it
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        database.commit()
    with tracked("sft", str(tmp_path / "out"), uri=uri) as tracker:
        for step in range(3):
            tracker.log_metrics({"train.loss": 2.0}, step=step)
        assert tracker.wait_started() is None
    told = [record.message for record in caplog.records if "out-of-date" in record.message]
    assert len(told) == 1
    assert f"mlflow db upgrade {uri}" in told[0]
    assert "\n" not in told[0]
    assert Path(tmp_path, "out", "tracking-undelivered.jsonl").exists()


def test_a_damaged_file_of_the_undelivered_is_put_aside(tmp_path, tracking_uri, caplog):
    output, uri = tmp_path / "out", tracking_uri
    output.mkdir()
    (output / "tracking-undelivered.jsonl").write_text("{\n")
    with tracked("sft", str(output), uri=uri) as tracker:
        tracker.log_metrics({"train.loss": 1.0}, step=1)
        assert tracker.wait_started()
    assert (output / "tracking-undelivered.jsonl.damaged").read_text() == "{\n"
    assert "tracking-undelivered.jsonl:1 is no call" in caplog.text
