"""Judges: a twin of ours and a model of transformers say the same of the same weights, and both what the softmax says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import llada
from llada.errors import UserError
from llada.evals.perplexity.judge import GenerativeConfig, encode_documents, judge_tokenizer, open_judge
from llada.model.hf import save_model
from llada.tokenizer import encode_texts

EOS = 0  # <|endoftext|> of a tokenizer trained here


def test_of_the_ends_in_a_piece_the_first_is_scored(causal_model: str) -> None:
    judge = open_judge(causal_model, 6)
    network, _ = llada.load(causal_model)
    ids = [9, EOS, 12, EOS, EOS, 7, 8, EOS]
    log_p = [network(torch.tensor([ids[:6]])), network(torch.tensor([ids[6:]]))]
    log_p = [value[0].log_softmax(-1).detach() for value in log_p]
    # Of the second piece 8 is read for nothing, and its EOS is the first there.
    expected = [log_p[0][at - 1, ids[at]] for at in (1, 2, 5)] + [log_p[1][0, EOS]]
    verdict = judge.verdict(ids)
    assert verdict.tokens == 4
    assert verdict.nats == pytest.approx(-float(torch.stack(expected).sum()), rel=1e-5)
    assert judge.verdict([EOS]) == (0.0, 0)


def test_transformers_says_the_same_of_the_same_weights(causal_model: str, tmp_path: Path) -> None:
    network, _ = llada.load(causal_model)
    save_model(network, tmp_path, layout="llama")
    shutil.copy(Path(causal_model, "tokenizer.json"), tmp_path)
    shutil.copy(Path(causal_model, "tokenizer_config.json"), tmp_path)
    ours, theirs = open_judge(causal_model, 5), open_judge(tmp_path, 5)
    assert type(theirs.network).__name__ == "LlamaForCausalLM"
    ids = [5, 17, 33, EOS, 290, 4, 1]
    assert theirs.verdict(ids).nats == pytest.approx(ours.verdict(ids).nats, rel=1e-4)
    assert theirs.verdict(ids).tokens == ours.verdict(ids).tokens == 5
    features = [judge.features(ids) for judge in (ours, theirs)]
    assert len(features[0]) == 16
    assert features[0] == pytest.approx(features[1], abs=1e-4)
    # Of the first five tokens, at the last.
    assert features[0] == pytest.approx(ours.features(ids[:5]))


def test_a_gpt2_is_a_judge_and_its_context_the_limit(causal_model: str, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=300, n_positions=7, n_embd=16, n_layer=1, n_head=2, eos_token_id=EOS)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(causal_model, name), tmp_path)
    judge = open_judge(tmp_path, 1024)
    assert judge.context == 7
    assert judge.verdict(list(range(6, 22))).tokens == 16 - 3


def test_a_text_is_spelled_anew_with_ends_of_its_own(causal_model: str) -> None:
    tokenizer = judge_tokenizer(causal_model)
    spelled = "What <|endoftext|> is"
    ids = encode_documents(tokenizer, ["The cat", spelled, ""])
    first, second = encode_texts(tokenizer, ["The cat", spelled])
    assert ids == [*first, EOS, *second, EOS]
    assert EOS not in second
    assert encode_documents(tokenizer, [""]) == [EOS]


def test_who_is_no_judge_is_named(
    causal_model: str, diffusion_model: str, tmp_path: Path, save_checkpoint: Callable[..., str]
) -> None:
    with pytest.raises(UserError, match=r"the judge .* is not autoregressive"):
        judge_tokenizer(diffusion_model)
    with pytest.raises(UserError, match="the judge nowhere is no checkpoint: it has no config.json"):
        judge_tokenizer("nowhere")
    bare = Path(save_checkpoint(tmp_path / "bare", causal=True))
    (bare / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"the judge has no tokenizer that can be read: no tokenizer\.json in"
    ):
        judge_tokenizer(bare)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(causal_model, name), tmp_path)
    with pytest.raises(
        UserError, match="cannot be read as a causal language model of transformers"
    ) as caught:
        open_judge(tmp_path, 8)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="num_texts must be at least 2"):
        GenerativeConfig(num_texts=1)
