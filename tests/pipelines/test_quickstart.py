"""The whole way on the built-in corpus, with a few steps: what it prints, and that a second run skips."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray.serve

from pipelines.quickstart import QuickstartArgs, quickstart

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("data", "pretrained", "sft_data", "model", "evaluation")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_quickstart_then_again(local_ray, corpus, tmp_path, capsys):
    args = QuickstartArgs(
        output=str(tmp_path / "quickstart"),
        input=(str(corpus / "text.jsonl"),),
        sft_input=(str(corpus / "chat.jsonl"),),
        pretrain_steps=8,
        sft_steps=4,
        question="What is 3?",
        progress=False,
    )
    first = quickstart(args)
    out = capsys.readouterr().out
    for expected in ("× the unigram baseline", "before", "after", "served", "loss.png", "mlflow.db", "next"):
        assert expected in out
    assert len(out.splitlines()) < 40, "one screen"
    for name in ("pretrained/loss.png", "model/model.safetensors", "mlflow.db", "summary.json"):
        assert (tmp_path / "quickstart" / name).is_file()
    assert first["pretrain"]["num_steps"] == 8
    assert first["sft"]["num_steps"] == 4
    assert json.loads((tmp_path / "quickstart" / "summary.json").read_text())["requests"] == 1

    # A stage that is done is not done again: nothing that one has made is rewritten, and the answer is the same.
    folder = tmp_path / "quickstart"
    manifests = [folder / stage / "manifest.json" for stage in STAGES]
    made = [*manifests, *(file for stage in STAGES for file in (folder / stage).rglob("*.safetensors"))]
    assert len(made) > len(manifests)
    stamps = {file: file.stat().st_mtime_ns for file in made}
    second = quickstart(args)
    assert {file: file.stat().st_mtime_ns for file in made} == stamps
    assert second["answer"] == first["answer"], "the same seed gives the same text"
    ray.serve.shutdown()  # the session's Ray goes on, its two CPUs are for the next test


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_quickstart_says_that_it_goes_on(corpus, tmp_path, number, code):
    """While Ray Train trains, which turns the signals into a SystemExit of its own."""
    output, log = tmp_path / "quickstart", tmp_path / "log"
    command = [sys.executable, "-m", "pipelines.quickstart", "--output", str(output), "--no-progress"]
    command += ["--input", str(corpus / "text.jsonl"), "--pretrain-steps", "100000"]

    def default() -> None:  # whoever runs the tests may ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=REPOSITORY, preexec_fn=default)
    try:
        while not (output / "pretrained" / "metrics").exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(120) == code
    finally:
        process.kill()
        process.wait()
    lines = log.read_text().strip().splitlines()
    assert lines[-1] == "llada quickstart: interrupted; the same command goes on where it stopped"
    assert not any("Traceback" in line for line in lines)
