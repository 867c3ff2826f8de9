"""lineage: from an answer, a model and a folder back to the raw files; what is no longer as it was read, and what leads nowhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from llada.sampling.config import SamplingConfig
from pipelines.lineage import trace
from pipelines.serving.backend import Health
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import build_api
from pipelines.stage.artifact import git_commit, read_manifest

pytestmark = pytest.mark.integration


class Backend:
    """A model's side in this process."""

    def __init__(self, folder: str) -> None:
        self.denoiser = Denoiser(folder, SamplingConfig(gen_length=4, block_length=4))
        self.stream = self.denoiser.stream

    def health(self) -> Health:
        return Health("ok")


@pytest.fixture(scope="module")
def endpoint(stages, served) -> Iterator[str]:
    """The URL of an endpoint of stages.model."""
    backend = Backend(stages.model)
    with served(build_api(backend, "tiny")) as address:
        yield address
    backend.denoiser.close()


@pytest.fixture
def mlflow(stages, monkeypatch) -> str:
    uri = f"sqlite:///{stages.root / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def test_an_endpoint_an_answers_id_and_a_model_lead_to_the_raw_text(llada, stages, endpoint, mlflow):
    code, out, err = llada("lineage", endpoint, "--json")
    assert code == 0, err
    by_endpoint = json.loads(out)
    body = {"messages": [{"role": "user", "content": "What is 7?"}], "stream": True}
    said = httpx.post(f"{endpoint}/v1/chat/completions", json=body, timeout=60).text
    (answer,) = {json.loads(line[6:])["id"] for line in said.splitlines() if line.startswith("data: {")}
    of_answer = json.loads(llada("lineage", answer, "--json")[1])
    of_folder = json.loads(llada("lineage", stages.model, "--json")[1])
    of_model = json.loads(llada("lineage", "models:/llada-sft", "--json")[1])
    assert of_answer.pop("answer") == answer
    assert of_folder.pop("answer") is None
    assert by_endpoint.pop("answer").startswith("cmpl-")
    assert of_model.pop("answer") is None
    assert by_endpoint == of_answer == of_folder == of_model

    folders = of_folder["folders"]
    data, chats = f"{stages.data}/snapshots/0000", f"{stages.sft_data}/snapshots/0000"
    assert of_folder["folder"] == stages.model
    assert folders.keys() == {stages.model, stages.pretrained, data, chats}
    for url, folder in folders.items():
        assert folder["git_commit"] == git_commit()
        assert folder["mlflow_run_id"] == read_manifest(url)["mlflow_run_id"]
    read = {url: {one["url"]: one["state"] for one in folder["inputs"]} for url, folder in folders.items()}
    assert read[stages.model] == {stages.pretrained: "same", chats: "same"}
    assert read[stages.pretrained] == {data: "same"}
    assert read[data] == {}
    assert read[chats] == {f"{stages.data}/tokenizer": "not made by a stage"}
    text = Path(stages.raw, "text.jsonl")
    (raw,) = folders[data]["raw"]
    assert (raw["files"], raw["bytes"], raw["first_files"]) == (1, text.stat().st_size, [str(text)])


def test_the_tree(llada, stages, mlflow):
    code, out, err = llada("lineage", stages.model, "--files", "0")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == stages.model
    assert lines[1].startswith("   checkpoint by sft · 20")
    assert (
        f"· commit {git_commit()[:10]} · MLflow run {read_manifest(stages.model)['mlflow_run_id']}"
        in lines[1]
    )
    drawn = [line for line in lines if "─ " in line]
    assert sorted(line.index("─") for line in drawn) == [1, 1, 4, 4, 4, 7]
    assert sum("raw files of snapshot 0000: 1 (" in line for line in lines) == 2
    assert lines[-1].endswith("… 1 more (--files)")


def test_what_is_no_longer_as_it_was_read(llada, stages, tmp_path, monkeypatch):
    """The folder that it started from was trained on, the other is gone."""
    base, model = tmp_path / "base", tmp_path / "model"
    shutil.copytree(stages.pretrained, base)
    model.mkdir()
    manifest = read_manifest(stages.model)
    for entry in manifest["inputs"]:
        entry["url"] = str(base) if entry["url"] == stages.pretrained else str(tmp_path / "gone")
    (model / "manifest.json").write_text(json.dumps(manifest))
    assert {read.state for read in trace(str(model))[str(model)].inputs} == {"same", "gone"}
    changed = read_manifest(str(base))
    changed["config_hash"] = "0" * 16
    (base / "manifest.json").write_text(json.dumps(changed))
    assert {read.state for read in trace(str(model))[str(model)].inputs} == {"changed", "gone"}
    out = llada("lineage", str(model))[1]
    assert f"{base}  (it has changed since it was read)" in out
    assert f"{tmp_path / 'gone'}  (gone)" in out


def test_snapshots_up_to_the_one_that_was_read(stages, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(stages.data, data)
    shutil.copytree(data / "snapshots/0000", data / "snapshots/0001")
    newest = read_manifest(str(data))
    (data / "manifest.json").write_text(json.dumps({**newest, "snapshot": "snapshots/0001"}))
    assert len(trace(str(data))[f"{data}/snapshots/0001"].raw) == 2
    (raw,) = trace(f"{data}/snapshots/0000", files=0)[f"{data}/snapshots/0000"].raw
    assert (raw.files, raw.first_files) == (1, ())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (f"cmpl-{'0' * 32}-{'1' * 32}", f"no run {'0' * 32} in MLflow"),
        (f"chatcmpl-{'1' * 32}", "names no MLflow run, for its checkpoint had none"),
        ("models:/none@champion", "no models:/none@champion in MLflow"),
        ("nowhere", "no manifest.json at"),
    ],
)
def test_what_leads_nowhere_is_one_line(llada, mlflow, what: str, said: str):
    code, _, err = llada("lineage", what)
    assert (code, len(err.strip().splitlines())) == (1, 1)
    assert said in err


def test_what_is_no_endpoint_is_one_line(llada, mlflow, web_server):
    server = web_server({"completions": b'{"id": "cmpl-B9MBs8CjcvOLX2RRMKkhpAiRUBEyc"}'})
    for folder, said in (
        ("plain", "is no endpoint of llada"),
        ("500", "answers with status 500"),
        ("cut", "no endpoint answers"),
    ):
        code, _, err = llada("lineage", f"{server.url}/{folder}")
        assert (code, len(err.strip().splitlines())) == (1, 1), err
        assert said in err


def test_a_checkpoint_that_was_made_again_is_not_taken_for_the_one_that_answered(
    llada, stages, tmp_path, mlflow
):
    run = read_manifest(stages.pretrained)["mlflow_run_id"]
    path = Path(stages.pretrained) / "manifest.json"
    before = path.read_text()
    try:
        path.write_text(before.replace(run, "f" * 32))
        code, _, err = llada("lineage", f"cmpl-{run}-{'1' * 32}")
    finally:
        path.write_text(before)
    assert code == 1
    assert "is another checkpoint now" in err
