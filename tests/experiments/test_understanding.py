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
        for number in range(120):
            review = {"text": f"영화 {np.base_repr(number, 3)} 좋다", "rating": number % 10 + 1}
            stream.write(json.dumps(review) + "\n" + json.dumps(review) + "\n")
    script.main(["--text", str(folder), "--output", str(folder / "out"), "--quick"])
    return folder / "out"


def test_all_networks_have_their_numbers(script: ModuleType, done: Path):
    report = json.loads((done / "understanding.json").read_text())
    assert [row["network"] for row in report["rows"]] == [
        "LLaDA", "autoregressive", "BERT 15 %", "nothing learned before", script.BAG,
    ]  # fmt: skip
    assert all(0 <= share <= 1 for row in report["rows"] for share in row["accuracy"])
    assert report["majority"] == 0.5
    for row in report["rows"][:-1]:
        accuracies = row["finetuning"]["accuracies"]
        assert len(accuracies) == len(script.QUICK.finetunings)
        assert row["finetuning"]["best"] == int(np.argmax(accuracies))
    assert (done / "understanding.png").stat().st_size > 10_000
    text = (done.parent / "nsmc_20k.jsonl.gz").read_bytes()
    assert report["settings"]["text"]["sha256"] == hashlib.sha256(text).hexdigest()
    runs = [json.loads(file.read_text()) for file in [*(done / "runs").iterdir(), done / "characters.json"]]
    untrained = [run["cpu_s"] for run in runs if "validation_loss" not in run]
    assert min(untrained) > 0
    assert report["cpu_s"] == pytest.approx(sum(run["cpu_s"] for run in runs))
    assert "| BERT 15 % |" in (done / "understanding.md").read_text()


@pytest.fixture(scope="module")
def experiment(script: ModuleType, done: Path):
    return script.Experiment(done.parent / "nsmc_20k.jsonl.gz", done, script.QUICK)


def test_what_is_judged_is_neither_learned_nor_chosen_by(script: ModuleType, experiment, done: Path):
    parts = {"judged": 16, "of_choice": 8, "labelled": 16}
    for part, size in parts.items():
        labels = [script.label_of(rating) for _, rating in getattr(experiment, part)]
        assert (labels.count(0), labels.count(1)) == (size // 2, size // 2)
    texts = {part: {text for text, _ in getattr(experiment, part)} for part in parts}
    assert len(set().union(*texts.values())) == sum(parts.values())
    rows = {tuple(experiment.padded(text)) for text in texts["judged"] | texts["of_choice"]}
    for split in ("train", "validation"):
        dataset = TokenDataset(str(done / "data"), split)
        found = dataset.rows(np.arange(len(dataset))).tokens.tolist()
        assert rows.isdisjoint(map(tuple, found))
        assert all(row[0] == row[-1] == script.EOS for row in found)


def test_ratings_between_have_no_label(script: ModuleType):
    assert [script.label_of(rating) for rating in (1, 4, 5, 8, 9, 10)] == [0, 0, None, None, 1, 1]


def test_too_few_reviews_of_a_kind_are_told(script: ModuleType):
    reviews = [(str(number), 1 if number < 3 else 10) for number in range(20)]
    assert [len(part) for part in script.balanced(reviews, (4, 2), Path("some"))] == [4, 2]
    with pytest.raises(SystemExit, match="some has too few negative reviews: 4 are wanted"):
        script.balanced(reviews, (4, 4), Path("some"))


def test_counted_characters_tell_what_characters_tell(script: ModuleType, tmp_path: Path):
    signs = {0: "가나다라", 1: "마바사아"}
    with gzip.open(tmp_path / "nsmc_20k.jsonl.gz", "wt", encoding="utf-8") as stream:
        for number in range(120):
            text = "".join(signs[number % 2][int(digit)] for digit in np.base_repr(number // 2 + 64, 4))
            stream.write(json.dumps({"text": text, "rating": 10 if number % 2 else 1}) + "\n")
    experiment = script.Experiment(tmp_path / "nsmc_20k.jsonl.gz", tmp_path / "out", script.QUICK)
    found = experiment.count_characters()
    assert found["accuracy"] == 1.0
    assert found["strength"] == script.STRENGTHS[int(np.argmax(found["accuracies"]))]


def test_the_readme_shows_the_committed_result(script: ModuleType):
    report = json.loads((HERE / "results" / "understanding.json").read_text())
    assert script.table(report) in (HERE.parents[1] / "README.md").read_text()
