"""A stage's beginning and end: the folder and the MLflow run say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada.errors import UserError
from pipelines.stage.artifact import open_output, read_manifest
from pipelines.stage.delivery import EXPERIMENT
from pipelines.stage.lifecycle import StageInput, begin_stage, finish_stage, folder_input, named_input
from pipelines.stage.tracking import tracked

pytestmark = pytest.mark.integration
CONFIG = {"seed": 3, "sampling": {"steps": 8, "stop": ("a", "b")}}


def test_begin_finish_skip(tmp_path, tracking_uri):
    mlflow = pytest.importorskip("mlflow")
    data, output, uri = str(tmp_path / "data"), str(tmp_path / "out"), tracking_uri
    made = open_output(data, stage="prepare", config={}, inputs=[]).finish(
        {"rows": 1}, kind="tokens", mlflow_run_id="parent"
    )
    inputs = [folder_input("data", data), StageInput("prompts", "s3://bucket/p.jsonl", "abc")]
    with tracked("generate", output, uri=uri) as tracker:
        folder = begin_stage("generate", output, config=CONFIG, inputs=inputs, tracker=tracker)
        assert folder.manifest is None
        (tmp_path / "out" / "results.json").write_text("{}")
        assert tracker.wait_started(60)
        manifest = finish_stage(
            folder, tracker, {"tokens": 5}, kind="generations", artifacts=("results.json",), results={"x": 1}
        )
    assert manifest == read_manifest(output)
    assert manifest["results"] == {"x": 1}
    assert [entry["url"] for entry in manifest["inputs"]] == [data, "s3://bucket/p.jsonl"]
    assert json.loads(Path(output, "stage.json").read_text())["inputs"] == manifest["inputs"]

    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert run.info.run_id == manifest["mlflow_run_id"]
    assert run.data.params == {"seed": "3", "sampling.steps": "8", "sampling.stop": "('a', 'b')"}
    assert run.data.metrics["tokens"] == 5
    assert run.data.tags["input.data.run_id"] == made["mlflow_run_id"]
    digests = {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs}
    assert digests == {data: made["config_hash"], "s3://bucket/p.jsonl": "unknown"}
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"results.json", "manifest.json"}

    with tracked("generate", output, uri=uri) as tracker:
        again = begin_stage("generate", output, config=CONFIG, inputs=inputs, tracker=tracker)
    assert again.manifest == manifest
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_without_mlflow(tmp_path):
    folder = begin_stage("sft", str(tmp_path / "out"), config={}, inputs=[], tracker=None)
    assert finish_stage(folder, None, {}, kind="checkpoint")["mlflow_run_id"] is None


def test_what_a_user_names_is_known_by_its_content(tmp_path):
    (tmp_path / "a").mkdir()
    file, twin = tmp_path / "a" / "texts.txt", tmp_path / "twin.txt"
    file.write_text("one")
    twin.write_text("one")
    before = named_input("texts", str(file))
    assert (before.role, before.url) == ("texts", str(file))
    assert named_input("texts", str(twin)).id == before.id
    folder = named_input("judge", str(tmp_path / "a"))
    assert folder == folder_input("judge", str(tmp_path / "a"))
    file.write_text("two ")
    assert named_input("texts", str(file)).id != before.id
    assert named_input("judge", str(tmp_path / "a")).id != folder.id
    with pytest.raises(UserError, match=r"there is no file .*none\.txt"):
        named_input("texts", str(tmp_path / "none.txt"))
