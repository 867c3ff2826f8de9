"""What is written from left to right: against a loop over whole logits, by the network's own distribution, in any company."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.evals.autoregressive.writing import (
    check_writing,
    complete_left_to_right,
    never_written,
    settings_in_force,
    write_left_to_right,
)
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.config import SamplingConfig
from llada.tokenizer import train_tokenizer

GREEDY = SamplingConfig(gen_length=6)
PROMPTS = [[3], [5, 17, 40, 2], [9, 9]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["The cat sat on the mat. It is what it is."] * 5, 300)


@pytest.fixture(scope="module")
def network() -> Transformer:
    model = Transformer(ModelConfig(300, 16, 2, 2, 24, max_length=24, causal=True))
    model.init_weights(3)
    return model.double().eval()


def test_greedy_is_the_likeliest_token_again_and_again(network: Transformer) -> None:
    never = [int(network(torch.tensor([[3]]))[0, -1].argmax())]
    for never_ids in ([], never):
        expected = []
        for prompt in PROMPTS:
            tokens = list(prompt)
            for _ in range(6):
                logits = network(torch.tensor([tokens]))[0, -1].detach()
                logits[never_ids] = -torch.inf
                tokens.append(int(logits.argmax()))
            expected.append(tokens[len(prompt) :])
        assert write_left_to_right(network, PROMPTS, GREEDY, never_ids=never_ids) == expected


def test_drawn_tokens_have_the_networks_distribution(network: Transformer) -> None:
    sampling = SamplingConfig(gen_length=1, temperature=1.0, top_k=4)
    written = write_left_to_right(network, [PROMPTS[1]] * 4000, sampling, seed=0)
    counts = Counter(token for (token,) in written)
    top = network(torch.tensor([PROMPTS[1]]))[0, -1].detach().topk(4)
    assert set(counts) == set(top.indices.tolist())
    for token, share in zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True):
        assert counts[token] / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)


def test_a_seed_gives_the_same_text_in_any_company(network: Transformer) -> None:
    sampling = SamplingConfig(gen_length=8, temperature=1.0)
    together = write_left_to_right(network, PROMPTS, sampling, seed=[4, 5, 6])
    alone = [write_left_to_right(network, [p], sampling, seed=[4 + n])[0] for n, p in enumerate(PROMPTS)]
    assert together == alone
    assert write_left_to_right(network, PROMPTS, sampling, seed=4) == together
    assert write_left_to_right(network, PROMPTS, sampling, seed=7) != together


def test_texts_end_where_they_say(network: Transformer, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ["The cat", "It", ""]
    settings = SamplingConfig(gen_length=12, temperature=1.5, logits_eos_inf=True)
    whole = complete_left_to_right(network, tokenizer, prompts, settings, seed=1)
    assert [line["prompt"] for line in whole] == prompts
    for line in whole:
        assert (line["finish_reason"], line["tokens"], line["nfe"]) == ("length", 12, 12)
        assert line["reveal_step"] == list(range(12))
    assert complete_left_to_right(network, tokenizer, prompts, settings, seed=1, max_tokens=1) == whole
    # The text ends before a stop string, and no forward is spent behind it.
    stop = whole[0]["text"][3:5]
    cut = complete_left_to_right(network, tokenizer, prompts, settings, seed=1, stop=[stop])[0]
    assert (cut["text"], cut["finish_reason"]) == (whole[0]["text"].partition(stop)[0], "stop")
    assert cut["nfe"] < 12
    # An end of text ends it, and is no part of it.
    end = tokenizer.eos_token_id
    ids = [tokenizer.encode(line["text"], add_special_tokens=False) for line in whole]
    assert all(end not in row for row in ids)
    free = SamplingConfig(gen_length=12, temperature=50.0)
    ended = [
        line
        for line in complete_left_to_right(network, tokenizer, [""] * 400, free, seed=0)
        if line["finish_reason"] == "stop"
    ]
    assert ended
    assert all(line["nfe"] == line["tokens"] + 1 for line in ended)


def test_a_mask_and_by_request_an_end_are_never_written(tokenizer: PreTrainedTokenizerFast) -> None:
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    assert never_written(tokenizer, GREEDY) == [mask]
    assert set(never_written(tokenizer, SamplingConfig(logits_eos_inf=True))) == {mask, eos}


def test_what_is_not_for_it_is_named(network: Transformer, tokenizer: PreTrainedTokenizerFast) -> None:
    for settings, name in (
        ({"cfg_scale": 1.0}, "cfg_scale"),
        ({"fixed": {0: 3}}, "fixed"),
        ({"forbidden": {"*": (3,)}}, "forbidden"),
        ({"initial_length": 4}, "initial_length"),
    ):
        with pytest.raises(UserError, match=rf"some/model is autoregressive .* sampling\.{name} is for"):
            check_writing(SamplingConfig(gen_length=8, block_length=8, **settings), "some/model")  # type: ignore[arg-type]
    check_writing(SamplingConfig(steps=64, block_length=8, threshold=0.9), "some/model")
    assert settings_in_force(SamplingConfig(remasking="ancestral"))["temperature"] == 1
    with pytest.raises(UserError, match="exceeds the context length of 24"):
        write_left_to_right(network, [[1] * 19], GREEDY)
    with pytest.raises(UserError, match="token id 300 lies outside"):
        write_left_to_right(network, [[300]], GREEDY)
    broken = Transformer(network.config)
    broken.init_weights(0)
    with torch.no_grad():
        broken.lm_head.weight[0] = torch.nan
    with pytest.raises(FloatingPointError):
        complete_left_to_right(broken, tokenizer, ["The"], GREEDY)
