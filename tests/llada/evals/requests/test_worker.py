"""Blocks of requests: their answers are those of the plain functions, and each has its part of what they took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llada.evals.requests.scoring import Pair, ScoreConfig, score_pairs
from llada.evals.requests.worker import Setup, WriteBlock
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.completions import complete_texts
from llada.sampling.config import SamplingConfig
from llada.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["The cat sat on the mat."] * 5, 300)
PAIRS = [([5, 6, 7], [8]), ([5, 6], [9, 10, 11])]
SAMPLING = {"gen_length": 6, "block_length": 3}


def open_model(*, fast: bool, causal: bool = False) -> tuple[Transformer, PreTrainedTokenizerFast]:
    ids = {"mask_token_id": TOKENIZER.mask_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    model = Transformer(ModelConfig(300, 16, 1, 2, 32, max_length=32, causal=causal, **ids))
    model.init_weights(0)
    return model.eval(), TOKENIZER


@pytest.mark.parametrize(("rule", "forwards"), [("monte_carlo", [1, 4]), ("confidence", [1, 3])])
def test_a_score_comes_with_the_forwards_it_took(rule: str, forwards: list[int]) -> None:
    config = ScoreConfig(rule, num_samples=4)  # type: ignore[arg-type]
    score = Setup(open_model, config.max_tokens).build_scorer()
    begin = time.perf_counter()
    found = score({"name": "", "num_requests": 2, "pairs": PAIRS, "score": {"rule": rule, "num_samples": 4}})
    whole = time.perf_counter() - begin
    expected = score_pairs(open_model(fast=True)[0], [Pair(*pair) for pair in PAIRS], config)
    assert [(line["log_p"], line["is_greedy"]) for line in found] == [tuple(score) for score in expected]
    assert [line["nfe"] for line in found] == forwards
    # Shared out by the tokens that the network was fed: 4 of the first row, 5 of the second.
    parts = [line["seconds"] for line in found]
    assert 0 < sum(parts) <= whole
    assert parts[1] / parts[0] == pytest.approx(forwards[1] * 5 / 4, rel=0.01)
    assert json.loads(json.dumps(found)) == found


def test_a_text_comes_with_its_forwards_and_the_order_of_its_tokens() -> None:
    write: Callable[[WriteBlock], list] = Setup(open_model, 8192).build_writer()
    prompts = [[20, 21], [22, 23, 24]]
    block: WriteBlock = {
        "name": "", "num_requests": 2, "prompts": prompts, "suffixes": [[30], []], "seeds": [7, 3], "sampling": SAMPLING, "stop": []
    }  # fmt: skip
    found = write(block)
    network, tokenizer = open_model(fast=True)
    expected = complete_texts(
        network, tokenizer, prompts, SamplingConfig(**SAMPLING), suffixes=[[30], []], seed=[7, 3]
    )
    for line, whole in zip(found, expected, strict=True):
        assert line["text"] == whole["text"]
        assert line["nfe"] == whole["nfe"]
        assert len(line["reveal_step"]) == whole["tokens"]
        # Block by block, and a forward for each token.
        assert all(step < 3 for step in line["reveal_step"][:3])
        assert len(set(line["reveal_step"])) == whole["tokens"]
        assert line["seconds"] > 0


@pytest.mark.parametrize("causal", [False, True], ids=["masks", "autoregressive"])
@pytest.mark.parametrize("rule", ["monte_carlo", "left_to_right", "confidence"])
def test_no_forward_has_more_rows_than_it_may_and_that_changes_nothing(rule: str, causal: bool) -> None:
    """As `lm_eval --batch_size` asks: of scores and of texts."""
    fed: list[torch.Size] = []

    def watched(*, fast: bool) -> tuple[Transformer, PreTrainedTokenizerFast]:
        model, tokenizer = open_model(fast=fast, causal=causal)
        model.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].shape))
        return model.double(), tokenizer

    pairs = [([5, 6, 7], [8]), *(([n, 6], [9, 10 + n, 11]) for n in range(20, 26))]
    scoring = {"name": "", "num_requests": 7, "pairs": pairs, "score": {"rule": rule, "num_samples": 4}}
    writing = {
        "name": "", "num_requests": 5, "prompts": [[20 + n] for n in range(5)], "suffixes": [[]] * 5, "seeds": [*range(5)],
        "sampling": {**SAMPLING, "temperature": 1.0}, "stop": []
    }  # fmt: skip
    found = {}
    for rows in (2, None):
        setup = Setup(watched, 8192, rows)
        scores = [(line["log_p"], line["is_greedy"]) for line in setup.build_scorer()(scoring)]
        assert (max(shape[0] for shape in fed) == 2) == (rows == 2)
        fed.clear()
        found[rows] = scores, [line["text"] for line in setup.build_writer()(writing)]
        # A prompt of one token and six of an answer; rows of masks are fed unpadded, one behind the other.
        assert (max(shape.numel() for shape in fed) <= 2 * 7) == (rows == 2)
        fed.clear()
    assert found[2][1] == found[None][1]
    for (one, its), (other, others) in zip(found[2][0], found[None][0], strict=True):
        assert one == pytest.approx(other, rel=1e-9)
        assert its == others
