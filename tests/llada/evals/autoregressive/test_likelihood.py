"""Exact likelihoods: by the softmax of whole logits, and that they sum to one over all texts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from llada.evals.autoregressive.likelihood import is_causal, judge_next_tokens, next_token_nats
from llada.model.transformer import ModelConfig, Transformer


def network_of() -> Transformer:
    network = Transformer(ModelConfig(5, 16, 2, 2, 24, max_length=8, causal=True))
    network.init_weights(3)
    return network.double().eval()


def test_the_texts_behind_a_token_share_all_probability() -> None:
    texts = torch.tensor([[2, *text] for text in itertools.product(range(5), repeat=3)])
    scored = torch.ones_like(texts, dtype=torch.bool)
    scored[:, 0] = False
    nats = next_token_nats(network_of(), texts, scored)
    assert float((-nats.sum(1)).exp().sum()) == pytest.approx(1, rel=1e-9)
    assert nats[:, 0].abs().max() == 0


def test_only_what_is_asked_for_is_scored_and_a_plain_function_is_served() -> None:
    network = network_of()
    tokens = torch.tensor([[1, 0, 4, 2], [3, 3, 1, 0]])
    scored = torch.tensor([[False, True, False, True], [False, False, True, False]])
    log_p = network(tokens).log_softmax(-1)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for row, column in scored.nonzero().tolist():
        expected[row, column] = -log_p[row, column - 1, tokens[row, column]]
    for model in (network, lambda tokens: network(tokens)):
        torch.testing.assert_close(next_token_nats(model, tokens, scored), expected)
    with torch.no_grad():
        network.lm_head.weight[0] = math.nan
    with pytest.raises(FloatingPointError):
        next_token_nats(network, tokens, scored)


def test_what_it_would_have_written_is_told() -> None:
    network = network_of()
    tokens = torch.tensor([[1, 0, 4, 2, 3], [3, 3, 1, 0, 2]])
    likeliest = network(tokens).argmax(-1)
    tokens[0, 3] = int(network(tokens)[0, 2].argmax())
    scored = torch.tensor([[False, False, True, True, False], [False, True, True, True, True]])
    found = judge_next_tokens(network, tokens, scored)
    torch.testing.assert_close(found.nats, next_token_nats(network, tokens, scored))
    likeliest = network(tokens).argmax(-1)
    for row, column in itertools.product(range(2), range(5)):
        is_same = not scored[row, column] or likeliest[row, column - 1] == tokens[row, column]
        assert found.is_likeliest[row, column] == is_same
    assert found.is_likeliest[0, 3]
    assert not found.is_likeliest.all()
    assert is_causal(network)
    assert not is_causal(lambda tokens: tokens)
