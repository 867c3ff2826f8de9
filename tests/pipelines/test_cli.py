"""The command line: strict, one line for what a user can mend, exit codes."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llada.data.tokens.shards import TokenDataset
from llada.data.work.read_config import ReadConfig
from llada.presets import get_preset
from llada.settings import to_json
from pipelines.cli import STAGES, load_mixture, main

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


def test_convert_both_ways(capsys, tmp_path, golden_dir):
    golden = golden_dir / "llada_gqa"
    assert run(capsys, "convert", str(golden), str(tmp_path / "ours"))[0] == 0
    assert run(capsys, "convert", str(tmp_path / "ours"), str(tmp_path / "back"))[0] == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    expected = json.loads((golden / "config.json").read_text())
    expected.pop("transformers_version")  # of the program that wrote it
    assert config == expected
    code, _, err = run(capsys, "convert", str(golden), str(tmp_path / "ours"))
    assert code == 1
    assert "not empty" in err


def test_a_classifier_is_trained_and_used(capsys, tmp_path, local_ray):
    """Labels to a folder, and the folder as a filter: junk goes, the rest stays."""
    good = [
        f"The report explains in plain words how test number {i} was made and what came of it."
        for i in range(40)
    ]
    junk = [f"BUY NOW {i}!!! click here >>> cheap pills cheap pills $$$ {i}" for i in range(40)]
    labels = [{"text": t, "label": int(t in good)} for t in good + junk]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    folder = str(tmp_path / "classifier")
    code, out, err = run(
        capsys, "prepare", "--train-classifier", "--input", str(tmp_path / "labels.jsonl"), "--output", folder
    )
    assert (code, err) == (0, "")
    assert "auc 1.000" in out
    texts = [{"text": t.replace("test", "trial")} for t in good] + [
        {"text": t.replace("here", "there")} for t in junk
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    arguments = [
        "prepare",
        "tiny",
        "--input",
        str(tmp_path / "text.jsonl"),
        "--output",
        str(tmp_path / "out"),
    ]
    arguments += [
        "--read.filters",
        "classifier",
        "--read.rules.classifier.model",
        folder,
        "--read.min-chars",
        "1",
    ]
    code, _, err = run(capsys, *arguments, "--no-progress")
    assert code == 0, err
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["counts"]
    assert counts["documents_kept"] == len(good)
    assert counts["filtered"] == {"classifier.low_score": len(junk)}


def test_megatron_there_and_back(capsys, tmp_path, stages):
    """A prepared folder to .idx/.bin and back: the same rows."""
    code, out, err = run(capsys, "convert", stages.data, str(tmp_path / "corpus"))
    assert code == 0, err
    assert "corpus-train.idx: " in out
    back = str(tmp_path / "back")
    arguments = ["--tokenizer", f"{stages.data}/tokenizer", "--row-length", "32"]
    code, _, err = run(capsys, "convert", str(tmp_path / "corpus-train.idx"), back, *arguments)
    assert code == 0, err
    one, two = TokenDataset(stages.data), TokenDataset(back)
    rows = np.arange(len(two))
    assert two.lengths(rows).sum() == one.lengths(np.arange(len(one))).sum()
    assert np.array_equal(two.rows(rows[:-1]).tokens, one.rows(rows[:-1]).tokens)
    code, _, err = run(capsys, "convert", str(tmp_path / "corpus-train.idx"), str(tmp_path / "other"))
    assert code == 1
    assert "needs --tokenizer" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must hold 'name:'"),
        ("web: {inputs: [x]}\n", "unknown setting .*web.inputs; did you mean 'input'"),
        ("web: {input: [x], read: {filtres: [web]}}\n", "web.read.filtres; did you mean 'filters'"),
        ("web: {input: x}\n", "web.input must be"),
    ],
)
def test_a_mixture_file_is_strict(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_mixture(str(tmp_path / "m.yaml"), ReadConfig())
