"""Samples: what `complete_texts` gives for the prompts of the settings, in a file and in the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llada.errors import UserError
from llada.evals.autoregressive.writing import complete_left_to_right
from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.samples import write_samples
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.completions import complete_texts
from llada.sampling.config import SamplingConfig
from llada.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["The cat sat on the mat."] * 5, 300)


def build_model(**changes: Any) -> Transformer:
    ids = {"mask_token_id": TOKENIZER.mask_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    model = Transformer(ModelConfig(300, 16, 1, 2, 32, max_length=32, **ids, **changes))
    model.init_weights(0)
    return model.eval()


def test_samples_are_the_completions(tmp_path: Path) -> None:
    sampling = SamplingConfig(gen_length=8, steps=8, block_length=4, temperature=1.0)
    config = EvaluateConfig(tasks=("samples",), prompts=("The", "The cat"), sampling=sampling, seed=3)
    precisions = []

    def open_model(*, fast: bool):
        precisions.append(fast)
        return build_model(), TOKENIZER

    figures = write_samples(Evaluation(config, "m", open_model, None, str(tmp_path), map, str))  # type: ignore[arg-type]
    expected = complete_texts(build_model(), TOKENIZER, ["The", "The cat"], sampling, seed=3)
    assert figures == {"samples": expected}
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == expected
    assert precisions == [False]


def test_an_autoregressive_one_writes_from_left_to_right(tmp_path: Path) -> None:
    def write(sampling: SamplingConfig) -> list[Any]:
        config = EvaluateConfig(tasks=("samples",), prompts=("The", ""), sampling=sampling, seed=3)
        evaluation = Evaluation(
            config, "m", lambda *, fast: (build_model(causal=True), TOKENIZER), None, str(tmp_path), map, str
        )  # type: ignore[arg-type]
        return list(write_samples(evaluation)["samples"])

    sampling = SamplingConfig(gen_length=8, temperature=1.0)
    expected = complete_left_to_right(build_model(causal=True), TOKENIZER, ["The", ""], sampling, seed=3)
    assert write(sampling) == expected
    with pytest.raises(UserError, match=r"m is autoregressive .* sampling\.cfg_scale"):
        write(SamplingConfig(gen_length=8, cfg_scale=1.0))


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path) -> None:
    def open_model(*, fast: bool):
        return build_model(), None

    with pytest.raises(UserError, match="some/model has no tokenizer"):
        write_samples(Evaluation(EvaluateConfig(), "some/model", open_model, None, str(tmp_path), map, str))  # type: ignore[arg-type]
