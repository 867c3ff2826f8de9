"""A reader, a filter and an unmasking rule of one's own, each in one place, from the command line on real Ray.

Over HTTP: tests/pipelines/serving/test_replica.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.tokenizer import load_tokenizer, save_tokenizer, vocab_size

ROOT = Path(__file__).resolve().parents[1]
TOY = """
from dataclasses import dataclass

import torch

from llada.data.filters.chain import FILTERS
from llada.data.filters.filter import Filter, Filtered, Verdict
from llada.data.read.formats import READERS
from llada.data.read.parts import Reader, Record
from llada.data.read.stream import read_texts
from llada.sampling.rules import RULES, Rule


def read_quoted(part, options, rejects):
    for line, text in read_texts(part, b"\\n", options.max_record_bytes, rejects):
        author, _, quotation = text.partition(",")
        yield Record({"text": quotation, "id": author}, line)


READERS.register("quoted")(Reader((".quoted",), read_quoted, is_compressible=True, is_divisible=True, text_field="text"))


@FILTERS.register("calm")
@dataclass(frozen=True)
class Calm(Filter):
    most: float = 0.5
    label = "Capitals"
    reasons = {"calm.capitals": "a larger share of capitals than `most`"}

    def __call__(self, document, view):
        share = sum(map(str.isupper, view.text)) / len(view.text)
        return Filtered(document, Verdict("calm.capitals", share, self.most) if share > self.most else None)


def last_first(candidates):
    last = candidates.exists.sum(1, keepdim=True) - 1
    return candidates.exists & (torch.arange(candidates.shape[1]) == last)


RULES.register("last_first")(Rule(last_first))
"""


def llada(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command with the toys in its environment."""
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words],
        cwd=folder,
        env={**os.environ, "LLADA_PLUGINS": "toys", "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.integration
def test_toys_work_from_the_command_line(tmp_path):
    (tmp_path / "toys.py").write_text(TOY)
    lines = [f"author {n},the {n}th sentence of a small corpus" for n in range(80)]
    lines += [f"shouter {n},LOUD {n}" for n in range(5)]
    (tmp_path / "quotations.quoted").write_text("\n".join(lines) + "\n")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("num_cpus: 1\n")
    common = ("--no-progress", "--cluster", str(cluster))
    words = (
        "--input",
        "quotations.quoted",
        "--read.filters",
        "calm",
        "--read.min-chars",
        "1",
        "--output",
        "data",
    )
    done = llada(tmp_path, "prepare", "tiny", *words, *common)
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "data/manifest.json").read_text())["counts"]
    assert counts["documents_kept"] == 80
    assert counts["filtered"] == {"calm.capitals": 5}
    assert "Capitals" in (tmp_path / "data/snapshots/0000/report.html").read_text()

    tokenizer = load_tokenizer(tmp_path / "data/tokenizer")
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = Transformer(ModelConfig(vocab_size(tokenizer), 16, 1, 2, 32, max_length=64, **ids))
    model.init_weights(0)
    save_model(model, tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("the 7th\n")
    sampling = ("--sampling.gen-length", "6", "--sampling.remasking")
    generate = ("generate", "--model", "model", "--prompts", "prompts.txt", *common, *sampling)
    done = llada(tmp_path, *generate, "last_first", "--output", "answers")
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "answers/generations/0000000000.jsonl").read_text())
    assert answer["nfe"] == 6 or answer["finish_reason"] == "stop"  # one at a time

    done = llada(tmp_path, *generate, "last_fist", "--output", "refused")
    assert done.returncode == 2
    assert "did you mean 'last_first'" in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "refused").exists()
