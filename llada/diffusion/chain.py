"""log p of a text's tokens one by one, by the chain rule along an order in which they are revealed.

A masked-diffusion network has a conditional for every set of masks, so that each order has a likelihood of its own; their
mean over all orders is the bound that `likelihood.log_likelihood` estimates. Two of them score the answers of benchmarks:

- left to right (SMDM, arXiv 2410.18514): a distribution over texts of that length, like an autoregressive network's.
- by confidence (iLLaDA, arXiv 2606.25331): the masked token that the network gives the greatest probability comes next. As the
  order depends on the text itself, the sum over all texts may exceed one: a score, no likelihood.

Of a one-token answer all of them are the same number. As in LLaDA's own likelihood (get_log_likelihood.py) p is over all ids, the
mask among them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llada.diffusion.cross_entropy import token_cross_entropy
from llada.model.predict import (
    Model,
    check_restores_masks,
    check_tokens,
    check_weights,
    guided_predict,
    network_block,
    resolve_mask_id,
)
from llada.settings import require

Order = Literal["left_to_right", "confidence"]


@torch.no_grad()
def chain_log_probs(
    model: Model,
    tokens: Tensor,
    scored: Tensor,
    *,
    order: Order = "left_to_right",
    mask_id: int | None = None,
    cfg_scale: float = 0.0,
    max_rows: int = 16,
    **inputs: Tensor,
) -> Tensor:
    """log p of each scored token as it is revealed, (B, L) float64 on the CPU; 0 of the others. A row's sum is its score.

    A row takes as many forwards as it has scored tokens; those of left to right do not wait for each other.

    Args:
        tokens: (B, L) int64.
        scored: (B, L) bool, the tokens that are masked and revealed; the rest is given.
        cfg_scale: unsupervised guidance, the unconditional copy seeing nothing of what is given.
        max_rows: noised rows of a forward.
        inputs: (B, L) each, passed on to the network with their rows (segment_ids, for rows with padding).

    Raises:
        UserError: ids outside of the vocabulary, rows longer than the context, a mask token among those to score.
        FloatingPointError: the network's weights or logits are no numbers.
    """
    check_restores_masks(model)
    mask_id = resolve_mask_id(model, mask_id)
    check_tokens("chain_log_probs", model, tokens)
    require(
        not bool((tokens[scored] == mask_id).any()),
        f"chain_log_probs: the text to score holds the mask token {mask_id}, which has no likelihood",
    )
    check_weights(model)
    B, L = tokens.shape
    place = torch.arange(L, device=tokens.device)
    result = torch.zeros(B, L, dtype=torch.float64)

    def nats(rows: Tensor, masked: Tensor, at: Tensor) -> Tensor:
        """−log p of the tokens at the positions of `at`, in row-major order, of rows of the batch with `masked` (n, L)."""
        clean = tokens[rows]
        targets = clean[at]
        return guided_predict(
            model,
            torch.where(masked, mask_id, clean),
            at,
            ~scored[rows],
            cfg_scale,
            mask_id,
            None if network_block(model) is None else clean,
            read_out=lambda x, weight: token_cross_entropy(x, targets, weight, cfg_scale=cfg_scale),
            **{name: value[rows] for name, value in inputs.items()},
        )

    if order == "left_to_right":
        for part in scored.nonzero().split(max_rows):
            rows, position = part[:, 0], part[:, 1, None]
            log_p = -nats(rows, scored[rows] & (place >= position), place == position)
            result[rows.cpu(), part[:, 1].cpu()] = log_p.double().cpu()
    else:
        masked = scored.clone()
        while len(waiting := masked.any(1).nonzero()[:, 0]):
            for rows in waiting.split(max_rows):
                hidden = masked[rows]
                at = hidden & in_first_block(hidden, network_block(model))
                log_p = torch.full(hidden.shape, -torch.inf, dtype=torch.float64, device=tokens.device)
                log_p[at] = -nats(rows, hidden, at).double()
                best, chosen = log_p.max(1)
                # Of damaged logits, too, one that was asked for: the loop ends, and the number says so.
                chosen = torch.where(best.isfinite(), chosen, at.int().argmax(1))
                result[rows.cpu(), chosen.cpu()] = log_p.gather(1, chosen[:, None])[:, 0].cpu()
                masked[rows, chosen] = False
    if bool(result.isnan().any()):
        raise FloatingPointError(
            "chain_log_probs: the network's logits are no numbers (NaN); its weights are damaged"
        )
    return result


def in_first_block(hidden: Tensor, block: int | None) -> Tensor:
    """Which positions (n, L) lie in the block of a row's first hidden one: a block-causal network's later blocks are predicted
    behind a clean text."""
    if block is None:
        return torch.ones_like(hidden)
    place = torch.arange(hidden.shape[1], device=hidden.device) // block
    return place == place[hidden.int().argmax(1)][:, None]
