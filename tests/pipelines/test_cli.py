"""The command line: it comes at once, is strict, and has one line for what a user can mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llada.presets import PRESETS
from pipelines import cli

REPOSITORY = Path(__file__).resolve().parents[2]
# What a person waits for at `llada --help`: user and system time of the whole process, the interpreter's start included.
HELP_CPU_S = 0.3


def python(*words: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a process of its own."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def cpu_seconds(*words: str) -> float:
    """What a process of this interpreter costs."""
    process = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_every_command_has_help(llada):
    code, out, _ = llada("--help")
    assert code == 0
    assert all(name in out for name in (*cli.COMMANDS, *cli.PRESETS))
    for name in cli.COMMANDS:
        code, out, _ = llada(name, "--help")
        assert code == 0, name
        assert "usage" in out, name


def test_help_comes_at_once():
    assert min(cpu_seconds("-m", "pipelines.cli", "--help") for _ in range(3)) <= HELP_CPU_S


def test_the_presets_it_names_are_those_there_are():
    assert tuple(PRESETS) == cli.PRESETS


def test_every_command_is_a_file_and_none_is_left_out():
    files = {file.stem.replace("_", "-") for file in (REPOSITORY / "pipelines").glob("*.py")}
    assert files - {"--init--", "cli"} == set(cli.COMMANDS)


def test_help_of_a_command_waits_for_nothing_that_only_its_work_needs():
    """Neither for Ray nor for MLflow, nor for what torch's sharded tensors and checkpoints bring: half as long as torch itself."""
    late = {"ray", "mlflow", "sympy", "torch.distributed.checkpoint", "torch.distributed.tensor"}
    modules = [f"pipelines.{name.replace('-', '_')}" for name in cli.COMMANDS]
    done = python("-c", f"import sys, {', '.join(modules)}; print(sorted({late} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_python_dash_m_is_the_same_thing():
    """`python -m pipelines.<command>` hands its words to the same code: a typo fails like there, and without a warning."""
    done = python("-m", "pipelines.plan", "tiny", "--nonsense")
    assert done.returncode == 2
    assert "--nonsense" in done.stdout + done.stderr
    assert "Warning" not in done.stderr


def test_each_command_can_be_run_as_a_module():
    for name in cli.COMMANDS:
        source = (REPOSITORY / "pipelines" / f"{name.replace('-', '_')}.py").read_text()
        assert source.endswith(f'if __name__ == "__main__":\n    run_command("{name}")\n'), name


def test_a_mistyped_option_names_the_nearest(llada):
    code, out, err = llada("pretrain", "tiny", "--data", "d", "--output", "o", "--optim.lrr", "1")
    assert code == 2
    assert "--optim.lr " in out + err
    code, _, err = llada("pretrian")
    assert code == 2
    assert "did you mean 'pretrain'" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prepare", "tiny", "--input", "{tmp}/no-such.jsonl", "--output", "{tmp}/o"], "no-such.jsonl"),
        (["prepare", "tinny", "--input", "x", "--output", "o"], "did you mean 'tiny'"),
        (["prepare", "--input", "x", "--output", "o"], "name a preset first"),
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
        (
            ["serve", "--model", "models:/a@b", "--tracking-uri", "sqlite:///{tmp}/no.db"],
            "no.db: set MLFLOW_TRACKING_URI, or give the command --tracking-uri",
        ),
        (
            ["convert", "models:/a@b", "{tmp}/o", "--tracking-uri", "sqlite:///{tmp}/no.db"],
            "no.db: set MLFLOW_TRACKING_URI, or give the command --tracking-uri",
        ),
    ],
)
def test_bad_input_gets_one_line_and_a_failing_exit_code(
    llada, tmp_path, tracking_uri, monkeypatch, argv, message
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    code, out, err = llada(*[word.format(tmp=tmp_path) for word in argv])
    assert code != 0
    assert message in err + out
    if code == 1:
        assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "o" / "manifest.json").exists()


@pytest.mark.slow  # tests/pipelines/stage/test_cluster.py: an absent cluster is reported quickly
def test_no_cluster_at_the_address(tmp_path, free_port):
    """In a process of its own: this one may have joined the session's Ray, which would be used as it is."""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"address: 127.0.0.1:{free_port()}\n")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "words " * 50}) + "\n")
    words = ["tiny", "--input", "in.jsonl", "--output", "o", "--cluster", "cluster.yaml"]
    done = python("-m", "pipelines.prepare", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert "no Ray cluster at 127.0.0.1" in done.stderr
    assert not (tmp_path / "o" / "manifest.json").exists()
