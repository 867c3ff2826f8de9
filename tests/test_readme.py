"""What the README shows, runs: its commands in order in an empty folder, its Python, its file names."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from llada.data.work.read_config import ReadConfig
from llada.sampling.cache import CACHES
from llada.sampling.config import SamplingConfig
from llada.sampling.rules import RULE_OF_KNOB
from pipelines.cli import main
from pipelines.prepare import load_mixture

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
# The same commands on a corpus of seconds; everything else stands as it is in the README.
SHORTER = {
    "pretrain": "--train.num-steps 6 --train.validate-every 6 --train.checkpoint-every 6 --model.d-model 32 "
    "--model.num-layers 1 --model.num-heads 2 --model.ffn-dim 64",
    "sft": "--train.num-steps 3 --train.validate-every 3 --train.checkpoint-every 3",
    "prepare": "--validation-fraction 0.2 --read.min-chars 1",
    "evaluate": "--max-rows 16 --num-samples 1 --sampling.gen-length 8 --sampling.steps 4 --sampling.block-length 8",
    "generate": "--sampling.gen-length 8 --sampling.steps 4 --sampling.block-length 8",
}


def commands(first_word: str) -> list[str]:
    """The README's shell commands that begin with this word."""
    lines = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
    return [line.split("   #")[0].strip() for line in lines if line.startswith(first_word)]


def test_files_it_names_exist():
    for name in re.findall(r"\]\(([\w./]+)\)", README) + re.findall(r"(?:ray_configs|infra)/[\w.]+", README):
        assert (ROOT / name).exists(), name


def test_the_mixture_it_shows_is_one(tmp_path):
    (block,) = (block for kind, block in BLOCKS if kind == "yaml")
    (tmp_path / "mixture.yaml").write_text(block)
    web, code = load_mixture(str(tmp_path / "mixture.yaml"), ReadConfig(min_chars=7))
    assert (web.weight, web.read.filters, web.read.min_chars) == (0.7, ("web",), 7)
    assert (code.epochs, code.read.filters) == (2.0, ())


def test_what_it_calls_settings_of_sampling_are_knobs():
    (section,) = re.findall(r"^## Sampling\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    table = [line.split("|")[2] for line in section.splitlines() if line.startswith("|")]
    named = set(re.findall(r"`(\w+)`", "".join(table)))
    assert named <= {field.name for field in fields(SamplingConfig)} | {"seed"}
    assert named >= set(RULE_OF_KNOB)
    assert all(name in table[3] for name in CACHES)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in commands("make"):
        assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line


def test_its_first_screen_shows_a_real_run():
    assert "× the unigram baseline" in README, "the quickstart's output is missing"


def test_figures_of_the_gpu_are_those_of_the_results():
    results = ROOT / "tests" / "benchmarks" / "results"
    training = json.loads((results / "gpu_train.json").read_text())
    for row in training["networks"]["llada_8b"]["results"]:
        if row["recomputed"] == "full" or not row["compiled"]:
            cells = f"{row['tokens_per_s']:,.0f} | {row['mfu']:.1%} | {row['allocated_gib']:.1f}"
            assert cells.replace("%", " %") in README
    sampling = json.loads((results / "gpu_sample.json").read_text())
    for cache in ("none", "prefix", "dual"):
        rows = [row for row in sampling["results"] if row["cache"] == cache]
        cells = [cache, *(f"{row['tokens_per_s']:.0f}" for row in rows)]
        assert f"| {' | '.join(cells)} |" in README
    assert {str(found)[:6] for found in training["checks"].values()}.isdisjoint({"FAILED"})


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_its_commands_run_in_order(tmp_path, monkeypatch, local_ray):
    words = ["the", "model", "reads", "a", "row", "of", "tokens", "and", "restores", "what", "was", "masked"]
    texts = [{"text": " ".join(words[i % 7 :] + words[: i % 5]) + f" {i}"} for i in range(600)]
    pairs = [{"prompt": f"What is {i}?", "response": f"The number {i}."} for i in range(40)]
    prompts = [{"prompt": "The model"}, {"messages": [{"role": "user", "content": "What is 3?"}]}]
    for name, records in (("text", texts), ("chat", pairs), ("prompts", prompts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ran = set()
    for command in commands("llada"):
        if "s3://" in command:
            continue  # tests/pipelines/test_prepare_corpus.py runs such things
        stage, *arguments = shlex.split(command)[1:]
        if stage == "serve":
            continue  # tests/pipelines/test_serve.py runs it, over HTTP
        if stage in ("check", "deploy", "lineage"):
            continue  # tests/pipelines/test_check.py looks at the same files, test_deploy.py and test_journeys.py run them
        main([stage, *arguments, *shlex.split(SHORTER.get(stage, ""))])  # raises SystemExit on failure
        ran.add(stage)
    assert ran == {"prepare", "pretrain", "sft", "evaluate", "generate", "plan"}
    answers = [
        json.loads(line) for line in Path("run/answers/generations/0000000000.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 2
    assert Path("run/mlflow.db").is_file()

    names: dict[str, object] = {}  # a later block goes on from an earlier one
    for python in (block for kind, block in BLOCKS if kind == "python"):
        exec(compile(python, "README.md", "exec"), names)
