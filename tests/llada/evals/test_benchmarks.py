"""Benchmarks of lm_eval as a task of ours: its figures, its documents, and what is wrong in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llada.errors import UserError
from llada.evals.benchmarks import run_benchmarks
from llada.evals.evaluation import BenchmarkConfig, EvaluateConfig, Evaluation
from llada.evals.harness import open_folder
from llada.evals.scoring import Pair, ScoreConfig, score_pairs
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.config import SamplingConfig
from llada.sampling.text import load
from llada.tokenizer import encode_texts, save_tokenizer, train_tokenizer

LINES = [{"question": f"What is {n}?", "choices": [f" {n}", f" {n + 1}"], "answer": n % 2} for n in range(5)]
TASK = {
    "task": "toy_questions",
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
}
CHOOSING = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "target_delimiter": ""}
WRITING = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["?"]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([line["question"] for line in LINES] * 5, 300)
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    network = Transformer(ModelConfig(300, 16, 1, 2, 32, max_length=64, **ids))
    network.init_weights(0)
    save_model(network, folder)
    save_tokenizer(tokenizer, folder)
    return str(folder)


@pytest.fixture
def evaluation(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "toy.jsonl")}}}
    for name, kind in (("choosing", CHOOSING), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**TASK, **data, **kind, "task": f"toy_{name}"}))
    lost = {**TASK, **CHOOSING, "task": "toy_lost", "dataset_kwargs": {"data_files": {"test": "/none.jsonl"}}}
    (tmp_path / "lost.yaml").write_text(json.dumps(lost))
    benchmarks = BenchmarkConfig(
        ("toy_choosing", "toy_writing"),
        task_folder=str(tmp_path),
        limit=4,
        gen_length=8,
        score=ScoreConfig("left_to_right"),
    )

    def map_blocks(
        build: Callable[[], Callable[[Any], Any]], blocks: Sequence[Any], *, folder: str
    ) -> Iterator[Any]:
        return (json.loads(json.dumps(build()(block))) for block in blocks)

    config = EvaluateConfig(benchmarks=benchmarks, sampling=SamplingConfig(block_length=4))
    open_model = partial(open_folder, model, None, None)
    return Evaluation(config, model, open_model, None, str(tmp_path / "out"), map_blocks, lambda: model)


def test_figures_are_those_of_the_answers(evaluation: Evaluation, model: str) -> None:
    figures = run_benchmarks(evaluation)
    network, tokenizer = load(model)
    hits = 0
    for line in LINES[:4]:
        given = encode_texts(tokenizer, [line["question"]])[0]
        wholes = encode_texts(tokenizer, [line["question"] + choice for choice in line["choices"]])
        pairs = [Pair(given, whole[len(given) :]) for whole in wholes]
        scores = [score.log_p for score in score_pairs(network, pairs, ScoreConfig("left_to_right"))]
        hits += scores.index(max(scores)) == line["answer"]
    assert figures["toy_choosing/acc/none"] == hits / 4
    assert 0 <= figures["toy_choosing/acc_stderr/none"] < 1
    assert figures["toy_writing/exact_match/none"] in (0, 0.25, 0.5, 0.75, 1)
    assert figures["requests_cut"] == 0
    lines = Path(evaluation.output, "benchmarks/toy_writing.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc"] for line in lines] == LINES[:4]
    assert all("?" not in json.loads(line)["resps"][0][0] for line in lines)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "needs --benchmarks.names"),
        pytest.param(
            ("toy_choosin",),
            "lm_eval has no task 'toy_choosin'; did you mean 'toy_choosing'",
            marks=pytest.mark.slow,  # lm_eval's list of its own tasks
        ),
        (("toy_lost",), r"the data of toy_lost cannot be had: .*none\.jsonl"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_one_line(
    evaluation: Evaluation, names: tuple[str, ...], message: str
) -> None:
    config = replace(evaluation.config, benchmarks=replace(evaluation.config.benchmarks, names=names))
    with pytest.raises(UserError, match=message) as caught:
        run_benchmarks(replace(evaluation, config=config))
    assert "\n" not in str(caught.value)
