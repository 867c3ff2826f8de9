"""The experiment with few reviews, as a user runs it, and what is learned, labelled and judged."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from llada.data.tokens.shards import TokenDataset

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def done(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("understanding")
    with gzip.open(folder / "nsmc_20k.jsonl.gz", "wt", encoding="utf-8") as stream:
        for number in range(60):
            review = {"text": f"영화 {np.base_repr(number, 3)} 좋다", "rating": number % 10 + 1}
            stream.write(json.dumps(review) + "\n" + json.dumps(review) + "\n")
    script.main(["--text", str(folder), "--output", str(folder / "out"), "--quick"])
    return folder / "out"


def test_all_networks_have_their_numbers(script: ModuleType, done: Path):
    report = json.loads((done / "understanding.json").read_text())
    assert [row["network"] for row in report["rows"]] == [
        "LLaDA", "autoregressive", "BERT 15 %", "nothing learned before",
    ]  # fmt: skip
    assert all(0 <= share <= 1 for row in report["rows"] for share in row["accuracy"])
    assert 0.5 <= report["majority"] <= 1
    assert (done / "understanding.png").stat().st_size > 10_000
    text = (done.parent / "nsmc_20k.jsonl.gz").read_bytes()
    assert report["settings"]["text"]["sha256"] == hashlib.sha256(text).hexdigest()
    runs = [json.loads(file.read_text()) for file in (done / "runs").iterdir()]
    untrained = [run["cpu_s"] for run in runs if "validation_loss" not in run]
    assert min(untrained) > 0
    assert report["cpu_s"] == pytest.approx(sum(run["cpu_s"] for run in runs))
    assert "| BERT 15 % |" in (done / "understanding.md").read_text()


def test_what_is_judged_is_not_learned(script: ModuleType, done: Path):
    experiment = script.Experiment(done.parent / "nsmc_20k.jsonl.gz", done, script.QUICK)
    judged, labelled = ({text for text, _ in part} for part in (experiment.judged, experiment.labelled))
    assert len(judged) == len(labelled) == 16
    assert judged.isdisjoint(labelled)
    assert all(script.label_of(rating) is not None for _, rating in experiment.judged + experiment.labelled)
    rows = {tuple(experiment.padded(text)) for text in judged}
    for split in ("train", "validation"):
        dataset = TokenDataset(str(done / "data"), split)
        found = dataset.rows(np.arange(len(dataset))).tokens.tolist()
        assert rows.isdisjoint(map(tuple, found))
        assert all(row[0] == row[-1] == script.EOS for row in found)


def test_ratings_between_have_no_label(script: ModuleType):
    assert [script.label_of(rating) for rating in (1, 4, 5, 8, 9, 10)] == [0, 0, None, None, 1, 1]


def test_the_readme_shows_the_committed_result(script: ModuleType):
    report = json.loads((HERE / "results" / "understanding.json").read_text())
    assert script.table(report) in (HERE.parents[1] / "README.md").read_text()
