"""Logits at chosen positions, with guidance: the one way everybody calls the network.

Sampler, likelihood and evaluation ask for some positions of a noised row; a network of ours then computes the head, its
widest matrix, at those alone. Any function of (tokens, **inputs) that returns (B, L, V) is served too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer
from llada.settings import require

Model = Callable[..., Tensor]
Reading = Callable[[Tensor, Tensor | None], Tensor]
"""What is wanted in place of logits, from what the head is given (N, D) and its weight (V, D); from a plain function's logits
(N, V) and None."""


def takes_packed_rows(model: Model) -> TypeGuard[Transformer]:
    """Is it a network of ours, which takes rows laid end to end, and any part of a row? One with a shift reads the position
    before a part, and takes whole rows alone."""
    return isinstance(model, Transformer) and not model.config.shift


def network_block(model: Model) -> int | None:
    """The length of a block-causal network's blocks; None of any other network, and of a plain function."""
    return model.config.block_length if takes_packed_rows(model) else None


def predict(
    model: Model, tokens: Tensor, where: Tensor, *, read_out: Reading | None = None, **inputs: Tensor
) -> Tensor:
    """Logits (N, V) at the N positions of `where` (B, L) bool, in row-major order, or what `read_out` makes in their place."""
    if isinstance(getattr(model, "config", None), ModelConfig):
        return model(tokens, logits_at=where, read_out=read_out, **inputs)
    logits = model(tokens, **inputs)[where]
    return logits if read_out is None else read_out(logits, None)


def guided_predict(
    model: Model,
    tokens: Tensor,
    where: Tensor,
    prompt: Tensor,
    cfg_scale: float | Tensor,
    mask_id: int,
    context: Tensor | None = None,
    *,
    read_out: Reading | None = None,
    **inputs: Tensor,
) -> Tensor:
    """`predict` with unsupervised classifier-free guidance (`guide`), the unconditional copy seeing no prompt.

    Args:
        prompt: (B, L) bool, positions replaced by the mask in the unconditional copy.
        cfg_scale: w, one for all or (N, 1); 0.0 spares the copy.
        context: (B, L), what a block-causal network sees in the earlier blocks; the copy sees no prompt there either.
        read_out: is given both copies' (2N, …), the unconditional half last, and guides them itself.
    """
    if context is not None:
        inputs["context"] = context
    if not isinstance(cfg_scale, Tensor) and cfg_scale == 0:
        return predict(model, tokens, where, read_out=read_out, **inputs)
    doubled = torch.cat([tokens, torch.where(prompt, mask_id, tokens)])
    inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
    if context is not None:
        inputs["context"] = torch.cat([context, torch.where(prompt, mask_id, context)])
    both = predict(model, doubled, torch.cat([where, where]), read_out=read_out, **inputs)
    return both if read_out is not None else guide(both, cfg_scale)


def guide(both: Tensor, cfg_scale: float | Tensor) -> Tensor:
    """un + (w + 1)(cond − un), (N, V), of logits (2N, V) with the unconditional half last."""
    conditional, unconditional = both.chunk(2)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def resolve_mask_id(model: Model, mask_id: int | None) -> int:
    """The explicit mask id, or else the one in the model's config."""
    if mask_id is None:
        mask_id = getattr(getattr(model, "config", None), "mask_token_id", None)
    if mask_id is None:
        raise UserError("no mask id: the model's config has none, pass mask_id=…")
    return mask_id


def check_restores_masks(model: Model) -> None:
    """Raises UserError for an autoregressive network."""
    require(
        not getattr(getattr(model, "config", None), "causal", False),
        "this network is autoregressive (causal): it restores no masks; `llada evaluate` scores it exactly, and its task samples lets "
        "it write from left to right",
    )


def config_eos_id(model: Model) -> int | None:
    """The id of EOS in the model's config; None for a plain function."""
    return getattr(getattr(model, "config", None), "eos_token_id", None)


def check_tokens(function: str, model: Model, *tokens: Tensor) -> None:
    """Refuse what the network has no embedding or no position for. `function` is whose arguments these are.

    Raises UserError for an id outside of the vocabulary and for rows longer than the context; a plain function knows
    neither, and is asked for none.
    """
    config = getattr(model, "config", None)
    size, longest = getattr(config, "vocab_size", None), getattr(config, "max_length", None)
    for ids in tokens:
        if longest is not None and ids.dim() == 2 and ids.shape[1] > longest:
            raise UserError(
                f"{function}: a canvas of {ids.shape[1]} tokens exceeds the model's context of {longest}"
            )
        if ids.numel() and (int(ids.min()) < 0 or (size is not None and int(ids.max()) >= size)):
            outside = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            rows = "" if size is None else f" of {size} rows"
            raise UserError(
                f"{function}: the token id {outside} lies outside of the model's vocabulary{rows}"
            )


def check_weights(model: Model) -> None:
    """Raises FloatingPointError for a weight that is no number; a plain function has none.

    Not every damaged weight shows in the logits: of scores that are no numbers, torch's attention on a CPU makes zeros.
    """
    parameters = getattr(model, "named_parameters", None)
    for name, value in parameters() if parameters else ():
        if not value.isfinite().all():
            raise FloatingPointError(f"the network's weight {name} holds NaN or infinite values")


def device_of(model: Model) -> torch.device | None:
    """Where the network's parameters are; None for a plain function."""
    parameters = getattr(model, "parameters", None)
    return next(parameters()).device if parameters else None
