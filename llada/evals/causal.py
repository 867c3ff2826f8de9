"""Exact likelihoods of an autoregressive network, ours or any function of tokens: those of a twin, and of a judge."""

from __future__ import annotations

import torch
from torch import Tensor

from llada.diffusion.cross_entropy import token_cross_entropy
from llada.diffusion.objective import predictors
from llada.model.predict import Model, check_weights, predict


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
