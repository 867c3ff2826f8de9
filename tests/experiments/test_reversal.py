"""The experiment with few people, as a user runs it, and what it counts as a right answer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from llada.data.tokens.shards import TokenDataset

HERE = Path(__file__).resolve().parent

STORIES = "<|endoftext|>".join(
    f"One day a {animal} ran home. It was very happy! The {animal} said hello."
    for animal in ["cat", "dog"] * 10
)


@pytest.fixture(scope="module")
def done(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reversal")
    (folder / "tinystories.txt").write_text(STORIES)
    script.main(["--text", str(folder), "--output", str(folder / "out"), "--quick"])
    return folder / "out"


@pytest.fixture(scope="module")
def experiment(script: ModuleType, done: Path):
    return script.Experiment(done.parent / "tinystories.txt", done, script.QUICK)


def test_both_twins_have_their_numbers(script: ModuleType, done: Path):
    report = json.loads((done / "reversal.json").read_text())
    assert [row["network"] for row in report["rows"]] == ["autoregressive", "LLaDA"]
    for row in report["rows"]:
        assert list(row["right"]) == list(script.KINDS)
        assert all(0 <= share <= 1 for shares in row["right"].values() for share in shares)
    assert (done / "reversal.png").stat().st_size > 10_000
    assert "| LLaDA |" in (done / "reversal.md").read_text()
    assert report["settings"]["text"]["sha256"] == hashlib.sha256(STORIES.encode()).hexdigest()


def test_rows_are_facts_and_one_in_four_ordinary_text(script: ModuleType, experiment, done: Path):
    dataset = TokenDataset(str(done / "data"), "train")
    rows = dataset.rows(np.arange(len(dataset))).tokens
    facts = {tuple(experiment.row(script.words_of(text))) for text in experiment.facts.texts}
    told = [tuple(row) in facts for row in rows.tolist()]
    assert sum(told) == 0.75 * len(rows)
    assert (rows[:, 0] == script.EOS).all()
    assert (rows[:, -1] == script.EOS).all()
    # No question's sentence is among them.
    asked = {
        tuple(experiment.row(script.words_of(f"{question.prompt} {question.answer}.")))
        for question in experiment.facts.questions
    }
    assert asked.isdisjoint(map(tuple, rows.tolist()))


def test_ordinary_sentences_are_of_frequent_words_and_not_too_long(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    assert script.words_of("Don't go, the cat said.") == ["Don't", "go", ",", "the", "cat", "said", "."]
    assert len(script.ordinary_sentences(STORIES, 6)) == 40  # "The cat said hello." and "It was very happy!"
    monkeypatch.setattr(script, "FREQUENT_WORDS", 5)
    assert script.ordinary_sentences(STORIES, 20) == []


def test_an_answer_is_right_when_all_of_it_is(script: ModuleType, experiment):
    (question, *_) = experiment.facts.questions
    prompt, answer = (script.words_of(text) for text in (question.prompt, question.answer + "."))

    class Parrot(torch.nn.Module):
        """An autoregressive network that goes on with these words."""

        def __init__(self, words: list[str]) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.ids = [experiment.ids[word] for word in words]

        def forward(self, tokens: torch.Tensor, logits_at: torch.Tensor) -> torch.Tensor:
            place = tokens.shape[1] - 1 - len(prompt)
            logits = torch.zeros(1, experiment.vocab_size)
            logits[0, self.ids[place] if place < len(self.ids) else script.EOS] = 1.0
            return logits

    assert experiment.answer("autoregressive", Parrot(answer), question)
    assert not experiment.answer("autoregressive", Parrot(answer[:-1]), question), "without a full stop"
    assert not experiment.answer("autoregressive", Parrot(["The", *answer[1:]]), question)


def test_the_readme_shows_the_committed_result(script: ModuleType):
    report = json.loads((HERE / "results" / "reversal.json").read_text())
    assert script.table(report) in (HERE.parents[1] / "README.md").read_text()
