"""Generative perplexity: the figures are those of the judge on what the sampler writes, whatever the batch."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import llada
from llada.errors import UserError
from llada.evals.autoregressive.writing import write_left_to_right
from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.perplexity.generative import (
    mauve_score,
    measure_generative_perplexity,
    split_documents,
    token_entropy,
)
from llada.evals.perplexity.judge import GenerativeConfig, encode_documents, open_judge
from llada.sampling.config import SamplingConfig
from llada.tokenizer import encode_texts

EvaluationOf = Callable[[str, EvaluateConfig], Evaluation]
SAMPLING = SamplingConfig(gen_length=24, steps=6, block_length=24, remasking="ancestral")


@pytest.fixture
def config(causal_model: str) -> EvaluateConfig:
    generative = GenerativeConfig(causal_model, num_texts=10, texts_per_forward=3, context=16)
    return EvaluateConfig(generative=generative, sampling=SAMPLING, seed=2)


def test_figures_are_the_judges(
    diffusion_model: str, causal_model: str, config: EvaluateConfig, evaluation_of: EvaluationOf
) -> None:
    evaluation = evaluation_of(diffusion_model, config)
    figures = measure_generative_perplexity(evaluation)
    model, tokenizer = llada.load(diffusion_model)
    assert tokenizer is not None
    seeds = [2 * 1_000_003 + number for number in range(10)]
    ids = llada.generate(model, [[]] * 10, seed=seeds, **asdict(SAMPLING)).sequences
    assert ids.shape == (10, 24)
    judge = open_judge(causal_model, 16)
    verdicts = [
        judge.verdict(encode_documents(tokenizer, split_documents(tokenizer, row))) for row in ids.tolist()
    ]
    nats, tokens = (sum(verdict[k] for verdict in verdicts) for k in (0, 1))
    assert figures["judged_tokens"] == tokens
    assert figures["generative_nats_per_token"] == pytest.approx(nats / tokens, rel=1e-6)
    assert figures["generative_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert figures["generative_nats_per_token_error"] > 0
    entropies = torch.tensor([token_entropy(row) for row in ids.tolist()])
    assert figures["sample_entropy"] == pytest.approx(float(entropies.mean()), rel=1e-6)
    assert figures["sample_entropy_error"] == pytest.approx(float(entropies.std()) / 10**0.5, rel=1e-5)
    lines = Path(evaluation.output, "generated.jsonl").read_text().splitlines()
    assert [json.loads(line)["judged_tokens"] for line in lines] == [verdict.tokens for verdict in verdicts]
    assert len({json.loads(line)["text"] for line in lines}) == 10
    alone = replace(config.generative, texts_per_forward=1)
    again = measure_generative_perplexity(evaluation_of(diffusion_model, replace(config, generative=alone)))
    assert again == pytest.approx(figures, rel=1e-5)


def test_an_autoregressive_checkpoint_is_judged_too(
    causal_model: str, config: EvaluateConfig, evaluation_of: EvaluationOf
) -> None:
    evaluation = evaluation_of(causal_model, config)
    figures = measure_generative_perplexity(evaluation)
    model, tokenizer = llada.load(causal_model)
    assert tokenizer is not None
    seeds = [2 * 1_000_003 + number for number in range(10)]
    # "ancestral" draws at a temperature of one; the text stands behind an end of text.
    sampling = SamplingConfig(gen_length=24, temperature=1.0)
    start = [tokenizer.eos_token_id]
    ids = write_left_to_right(model, [start] * 10, sampling, never_ids=[tokenizer.mask_token_id], seed=seeds)
    lines = Path(evaluation.output, "generated.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [tokenizer.decode(row) for row in ids]
    assert figures["generative_perplexity"] > 1
    assert figures["sample_entropy"] == pytest.approx(sum(map(token_entropy, ids)) / 10)


def test_entropy_counts_ids() -> None:
    assert token_entropy([5, 5, 5, 5]) == 0
    assert token_entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert token_entropy([1, 1, 2, 3]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


def test_texts_are_cut_at_their_ends_and_lose_other_special_tokens(diffusion_model: str) -> None:
    _, tokenizer = llada.load(diffusion_model)
    assert tokenizer is not None
    cat, mat = encode_texts(tokenizer, ["The cat", " mat"])
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    assert split_documents(tokenizer, [bos, *cat, eos, eos, *mat]) == ["The cat", "", " mat"]


def test_mauve_is_one_of_like_texts_and_less_of_others() -> None:
    draw = torch.Generator().manual_seed(0)

    def texts(shift: float) -> list[dict[str, object]]:
        rows = (torch.randn(60, 4, generator=draw) + shift).tolist()
        return [{"nats": 0.0, "tokens": 1, "features": row} for row in rows]

    near, far = (mauve_score(texts(0), texts(shift)) for shift in (0.0, 20.0))  # type: ignore[arg-type]
    assert near > 0.5 > far


def test_without_mauve_there_is_a_line(
    diffusion_model: str,
    config: EvaluateConfig,
    evaluation_of: EvaluationOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "people.jsonl").write_text('{"text": "The cat"}\n{"text": "It is"}\n')
    generative = replace(config.generative, reference=f"{tmp_path}/people.jsonl")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    figures = measure_generative_perplexity(
        evaluation_of(diffusion_model, replace(config, generative=generative))
    )
    assert "mauve" not in figures
    assert caplog.messages == [
        "MAUVE is left out, because mauve-text is not installed: pip install mauve-text"
    ]


def test_what_cannot_be_judged_is_one_line(
    diffusion_model: str,
    causal_model: str,
    config: EvaluateConfig,
    evaluation_of: EvaluationOf,
    tmp_path: Path,
) -> None:
    (tmp_path / "one.txt").write_text("all of it is one text")
    greedy = SamplingConfig(gen_length=24, steps=6, block_length=24)
    for model, changed, message in (
        (diffusion_model, replace(config, generative=GenerativeConfig()), "needs --generative.judge"),
        (diffusion_model, replace(config, sampling=greedy), "write the same text each time: set --sampling"),
        (
            causal_model,
            replace(config, sampling=replace(SAMPLING, cfg_scale=1.0)),
            r"is autoregressive .* sampling\.cfg_scale is for those that unmask",
        ),
        (
            diffusion_model,
            replace(config, generative=replace(config.generative, reference=f"{tmp_path}/one.txt")),
            r"one\.txt holds 1 texts, of which MAUVE needs many",
        ),
        (
            diffusion_model,
            replace(config, sampling=replace(SAMPLING, gen_length=65)),
            "exceeds the context length of 64",
        ),
    ):
        with pytest.raises(UserError, match=message):
            measure_generative_perplexity(evaluation_of(model, changed))
