"""The command line: strict, one line for what a user can mend, exit codes."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llada.config import to_json
from llada.presets import get_preset
from pipelines.cli import STAGES, main

REPOSITORY = Path(__file__).resolve().parents[2]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of a command."""
    code = 0
    try:
        main(argv)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_stage_has_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in STAGES)
    for name in STAGES:
        code, out, _ = run(capsys, name, "--help")
        assert code == 0, name
        assert "usage" in out, name


@pytest.mark.parametrize(
    "stage", ["prepare", "pretrain", "sft", "evaluate", "generate", "serve", "quickstart"]
)
def test_python_dash_m_is_the_same_thing(stage, monkeypatch):
    """`python -m pipelines.<stage>` hands its arguments to the same command line: a typo fails like there."""
    monkeypatch.setattr(sys, "argv", [stage, "tiny", "--nonsense"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"pipelines.{stage}", run_name="__main__")
    assert ended.value.code == 2


def test_a_mistyped_option_names_the_nearest(capsys):
    code, out, err = run(capsys, "pretrain", "tiny", "--data", "d", "--output", "o", "--optim.lrr", "1")
    assert code == 2
    assert "--optim.lr " in out + err
    code, _, err = run(capsys, "pretrian")
    assert code == 2
    assert "did you mean 'pretrain'" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prepare", "tiny", "--input", "{tmp}/no-such.jsonl", "--output", "{tmp}/o"], "no-such.jsonl"),
        (["prepare", "tinny", "--input", "x", "--output", "o"], "did you mean 'tiny'"),
        (["pretrain", "tiny", "--data", "{tmp}", "--output", "{tmp}/o"], "manifest.json"),
        (["pretrain", "tiny", "--data", "{tmp}", "--output", "{tmp}/o", "--resume"], "nothing was begun"),
        (["pretrain", "tiny", "--data", "d", "--output", "o", "--train.num-steps", "0"], "num_steps must be"),
        (["evaluate", "--model", "{tmp}/none", "--output", "{tmp}/o"], "--data"),
        (
            ["generate", "--model", "{tmp}/none", "--prompts", "{tmp}/p.jsonl", "--output", "{tmp}/o"],
            "p.jsonl",
        ),
        (["convert", "{tmp}/none", "{tmp}/o"], "none"),
        (["plan", "llada_8b", "--gpu", "abacus"], "abacus"),
        (["serve", "--model", "{tmp}/none"], "none"),
    ],
)
def test_bad_input_gets_one_line_and_a_failing_exit_code(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    code, out, err = run(capsys, *[word.format(tmp=tmp_path) for word in argv])
    assert code != 0
    assert message in err + out
    if code == 1:
        assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "o" / "manifest.json").exists()


def test_no_cluster_at_the_address(tmp_path, free_port):
    """In a process of its own: this one may have joined the session's Ray, which would be used as it is."""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"address: 127.0.0.1:{free_port}\n")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "words " * 50}) + "\n")
    arguments = ["tiny", "--input", "in.jsonl", "--output", "o", "--cluster", "cluster.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.prepare", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "no Ray cluster at 127.0.0.1" in done.stderr
    assert not (tmp_path / "o" / "manifest.json").exists()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_recipe_file_is_a_preset(capsys, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(to_json(get_preset("llada_1b")))
    code, out, _ = run(capsys, "plan", str(file), "--gpus", "64")
    assert code == 0
    assert "1,487,243,264" in out


def test_convert_both_ways(capsys, tmp_path, shared_dir):
    golden = shared_dir / "golden" / "llada_gqa"
    assert run(capsys, "convert", str(golden), str(tmp_path / "ours"))[0] == 0
    assert run(capsys, "convert", str(tmp_path / "ours"), str(tmp_path / "back"))[0] == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    expected = json.loads((golden / "config.json").read_text())
    expected.pop("transformers_version")  # of the program that wrote it
    assert config == expected
    code, _, err = run(capsys, "convert", str(golden), str(tmp_path / "ours"))
    assert code == 1
    assert "not empty" in err
