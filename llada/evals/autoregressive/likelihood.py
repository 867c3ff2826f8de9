"""Exact likelihoods of an autoregressive network, ours or any function of tokens: those of a twin, and of a judge."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llada.diffusion.cross_entropy import token_cross_entropy
from llada.diffusion.objective import predictors
from llada.model.predict import Model, check_weights, predict


def is_causal(model: Model) -> bool:
    """Whether it is an autoregressive network of ours."""
    return bool(getattr(getattr(model, "config", None), "causal", False))


@torch.no_grad()
def next_token_nats(model: Model, tokens: Tensor, scored: Tensor) -> Tensor:
    """−log p of each scored token given those before it, (B, L) float64 on the CPU; 0 of the others.

    Args:
        model: a causal network, (B, L) int64 → logits (B, L, V).
        scored: (B, L) bool; column 0 has no predecessor and must be False.

    Raises FloatingPointError when the network's weights or logits are no numbers.
    """
    assert not bool(scored[:, 0].any())
    check_weights(model)
    targets = tokens[scored]
    nats = predict(
        model, tokens, predictors(scored), read_out=lambda x, weight: token_cross_entropy(x, targets, weight)
    )
    if bool(nats.isnan().any()):
        raise FloatingPointError(
            "a likelihood is no number (NaN): the network's logits or weights are damaged"
        )
    result = torch.zeros(tokens.shape, dtype=torch.float64)
    result[scored.cpu()] = nats.double().cpu()
    return result


class NextTokens(NamedTuple):
    """Of each scored token, (B, L) on the CPU."""

    nats: Tensor
    """−log p given what stands before it, float64; 0 of the others."""
    is_likeliest: Tensor
    """Whether no other token is likelier there; True of the others."""


@torch.no_grad()
def judge_next_tokens(model: Model, tokens: Tensor, scored: Tensor) -> NextTokens:
    """`next_token_nats`, and whether the network would have written the same."""
    nats = next_token_nats(model, tokens, scored)
    ids = predict(model, tokens, predictors(scored), read_out=_likeliest)
    is_likeliest = torch.ones(tokens.shape, dtype=torch.bool)
    is_likeliest[scored.cpu()] = (ids == tokens[scored]).cpu()
    return NextTokens(nats, is_likeliest)


def _likeliest(x: Tensor, weight: Tensor | None) -> Tensor:
    """(N,) ids; a slice of the logits is there at a time."""
    parts = [part if weight is None else F.linear(part, weight.to(part.dtype)) for part in x.split(256)]
    return torch.cat([part.argmax(-1) for part in parts]) if parts else x.new_zeros(0, dtype=torch.int64)
