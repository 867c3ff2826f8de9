"""Stages as jobs: what is refused before anything is sent, and a real cluster with a token."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llada.errors import UserError
from pipelines.stage.artifact import git_commit
from pipelines.stage.delivery import open_client
from pipelines.stage.job_server import code_environment, job_server
from pipelines.submit import find_running, job_environment, named_files, read_job

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a cluster file and text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "cluster.yaml").write_text("address: auto\nruntime_env: {env_vars: {A: '1'}}\n")
    (tmp_path / "pipp.yaml").write_text("address: auto\nruntime_env: {pipp: [x]}\n")
    (tmp_path / "local.yaml").write_text("num_workers: 1\n")
    (tmp_path / "list.txt").write_text("s3://bucket/a.jsonl\n")
    (tmp_path / "data").mkdir()
    return tmp_path


# --- Before anything is sent ------------------------------------------------------------------------------------------


def test_a_job_is_what_its_stage_reads(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    words = [
        "tiny",
        "--input=@list.txt",
        "--output",
        "s3://b/o",
        "--cluster",
        "cluster.yaml",
        "--packing",
        "best_fit",
    ]
    job = read_job("prepare", words)
    assert job.entrypoint == (
        "python -m pipelines.prepare tiny --input=@list.txt --output s3://b/o --cluster cluster.yaml --packing best_fit"
    )
    assert set(job.files) == {"list.txt", "cluster.yaml"}
    assert job.cluster.runtime_env == {"env_vars": {"A": "1"}}
    expected = {
        "stage": "prepare",
        "preset": "tiny",
        "output": "s3://b/o",
        "commit": git_commit(),
        "mlflow": "http://mlflow",
    }
    assert expected.items() <= job.metadata.items()
    with job_environment(job, "here") as environment:
        sent = {path.name: path.read_text() for path in Path(environment["working_dir"]).iterdir()}
        assert sent == {name: (here / name).read_text() for name in job.files}
        assert [Path(path).name for path in environment["py_modules"]] == ["llada", "pipelines"]
        assert environment["env_vars"]["A"] == "1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-wait"], "name a stage"),
        (["prepare", "tiny", "--inputt", "x", "--output", "s3://b/o"], "prepare: does not parse: .*--input"),
        (["prepare", "tiny", "--row-length", "0", "--output", "s3://b/o"], "row_length"),
        (["prepare", "large", "--output", "s3://b/o"], "large"),
        (["prepare", "tiny", "--output", "run/data"], "--output run/data would be a folder of the job"),
        (["prepare", "tiny", "--output", "s3://b/o"], "without a --cluster file of `address: auto`"),
        (["prepare", "tiny", "--output", "s3://b/o", "--cluster", "local.yaml"], "without a --cluster file"),
        (["prepare", "tiny", "--output", "s3://b/o", "--cluster", "none.yaml"], "cannot read the cluster file"),
        (["prepare", "tiny", "--input", "data", "--output", "/o", "--cluster", "cluster.yaml"], "data is a folder of this"),
        (["prepare", "tiny", "--input=big", "--output", "/o", "--cluster", "cluster.yaml"], "big has 10,485,761 bytes"),
        (["prepare", "tiny", "--output", "/o", "--cluster", "pipp.yaml"], r"pipp.yaml: runtime_env: unknown key 'pipp'; did you mean"),
        (["follow"], "name the job"),
        (["pretrain", "--help"], "llada pretrain --help"),
        (["--code", "none.whl", "prepare", "tiny", "--output", "/o", "--cluster", "cluster.yaml"], "no job server"),
        (["--address", "host:8265", "list"], "must be http://host:8265"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line(here, llada, words, message):
    """Without a job server: nothing could have been sent."""
    (here / "big").write_bytes(b"x" * ((10 << 20) + 1))
    if not words[0].startswith("--address"):
        words = ["--address", "http://127.0.0.1:9", *words]
    code, out, err = llada("submit", *words)
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if not line.startswith("no --tracking-uri")]
    assert len(lines) == 1, err
    assert re.search(message, lines[0])


def test_files_are_those_below_the_working_directory(here, monkeypatch):
    monkeypatch.chdir(here / "data")
    with pytest.raises(UserError, match="not below this folder"):
        named_files(["--cluster", "../cluster.yaml"])
    assert named_files(["--cluster", str(here / "cluster.yaml"), "--read.filters", "web"]) == ()


# --- On a cluster -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster_client(ray_cluster, monkeypatch) -> Iterator:
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_cluster.token)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_cluster.address)
    with job_server(ray_cluster.address) as client:
        yield client


@pytest.fixture
def entrypoint(cluster_client) -> Callable[[str], str]:
    """entrypoint(line) runs any command as a job; its name."""
    return lambda line: cluster_client.submit_job(entrypoint=line)


@pytest.mark.timeout(600)
def test_a_stage_on_a_cluster(here, ray_cluster, cluster_client, corpus, llada: Command):
    """Sent, met again by the same command, followed to its end, and complete."""
    output = ray_cluster.folder / "data"
    (here / "cluster.yaml").write_text(
        "address: auto\nruntime_env: {env_vars: {TOKENIZERS_PARALLELISM: 'false'}}\n"
    )
    words = ["prepare", "tiny", "--input", str(corpus / "text.jsonl"), "--output", str(output)]
    words += ["--train-tokenizer-vocab", "320", "--row-length", "32", "--cluster", "cluster.yaml"]
    code, out, err = llada("submit", "--no-wait", *words)
    assert (code, out) == (0, ""), err
    name = re.search(r"job (prepare-\S+): http", err).group(1)

    other = read_job(words[0], [*words[1:], "--split-seed", "3"])
    with pytest.raises(UserError, match=f"{output}: job {name} is at work on it .*submit stop {name}"):
        find_running(cluster_client, other)
    code, out, err = llada("submit", *words)
    assert code == 0, out + err
    assert f"job {name} is this command already" in err
    assert f"{output}: " in out
    assert "\rpack:   0%|" in out
    assert "\npack:" not in out
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["git_commit"] == git_commit()  # there is no repository where it ran
    assert manifest["counts"]["train_tokens"] > 1000
    tracked = open_client(f"sqlite:///{ray_cluster.folder / 'mlflow.db'}").get_run(manifest["mlflow_run_id"])
    assert tracked.data.tags["ray_job"] == name

    code, out, _ = llada("submit", "list")
    (row,) = (line.split() for line in out.splitlines() if line.startswith(name))
    assert row[1] == "SUCCEEDED"
    assert row[-2:] == ["tiny", str(output)]


def test_the_exit_code_is_the_jobs(entrypoint, llada: Command):
    code, out, err = llada("submit", "follow", entrypoint("echo a word; exit 3"))
    assert code == 3
    assert "a word\n" in out
    assert "failed with exit code 3" in err


@pytest.mark.slow
def test_a_job_is_stopped(entrypoint, llada: Command):
    name = entrypoint("echo begun; sleep 300")
    deadline = time.monotonic() + 60
    while "RUNNING" not in llada("submit", "list")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert llada("submit", "stop", name)[:2] == (0, f"job {name} is being stopped\n")
    code, _, err = llada("submit", "follow", name)
    assert (code, err) == (143, f"job {name} was stopped\n")
    assert llada("submit", "stop", name)[1] == f"job {name} had ended before\n"
    code, _, err = llada("submit", "follow", name[:-1])
    assert code == 1
    assert f"no job '{name[:-1]}'; did you mean '{name}'?" in err


@pytest.mark.slow
def test_what_cannot_be_set_up_says_why(cluster_client, here, llada: Command):
    job = read_job("prepare", ["tiny", "--output", "/o", "--cluster", "cluster.yaml"])
    with code_environment("image", {"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"}) as environment:
        name = cluster_client.submit_job(entrypoint=job.entrypoint, runtime_env=environment)
    code, _, err = llada("submit", "follow", name)
    assert code == 1
    assert err.startswith(f"llada submit: job {name} did not start: ")


def test_a_wrong_token_is_one_line(ray_cluster, llada: Command, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    code, out, err = llada("submit", "--address", ray_cluster.address, "list")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert re.search(r"does not let us in .*\$RAY_AUTH_TOKEN", err)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_that_was_stopped_goes_on(here, ray_cluster, cluster_client, corpus, llada: Command):
    output = ray_cluster.folder / "stopped"
    words = [
        "prepare",
        "tiny",
        "--input",
        str(corpus / "text.jsonl"),
        "--output",
        str(output),
        "--cluster",
        "cluster.yaml",
    ]
    words += ["--train-tokenizer-vocab", "320", "--row-length", "32"]
    _, _, err = llada("submit", "--no-wait", *words)
    name = re.search(r"job (prepare-\S+): http", err).group(1)
    deadline = time.monotonic() + 120
    while not (output / "stage.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert llada("submit", "stop", name)[0] == 0
    assert llada("submit", "follow", name)[0] == 143
    assert not (output / "manifest.json").exists()
    code, out, err = llada("submit", *words)
    assert code == 0, out + err
    assert (output / "manifest.json").exists()
