"""Likelihood estimates of a masked-diffusion model: LLaDA's Monte-Carlo log-likelihood and a perplexity bound.

Both use the lower-variance form of the bound (LLaDA Eq. 6 and 14): draw l uniformly from {1 … T}, mask exactly l of the
T tokens, weigh by T/l. It is a bound without ε, and exact for T = 1.

Of a block-causal network it is the sum of its blocks' bounds (BD3-LM, arXiv 2503.09573, Eq. 8), each given the clean blocks
before it: the l tokens fall on the blocks as they do, and since ∫ t^{l−1} (1−t)^{T−l} dt = 1 / (l · C(T, l)), a pattern of k
masks in a block of n tokens has on average the weight 1 / (k · C(n, k)) that it has when the block is masked alone.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from llada.diffusion.cross_entropy import token_cross_entropy
from llada.diffusion.noise import row_keys, row_uniforms, stream_key, uniforms
from llada.errors import UserError
from llada.model.predict import (
    Model,
    check_restores_masks,
    check_tokens,
    check_weights,
    guided_predict,
    network_block,
    predict,
    resolve_mask_id,
)
from llada.settings import require, shorten


class PerplexityBound(NamedTuple):
    """An upper bound of the negative log-likelihood per token; exp(nats_per_token) bounds the perplexity."""

    nats_per_token: float
    standard_error: float  # of nats_per_token, from the spread over the sampled masks and rows


def mask_exactly(maskable: Tensor, counts: Tensor, uniform: Tensor) -> Tensor:
    """(B, L) bool with exactly `counts` (B,) of each row's maskable positions set: those with the lowest `uniform`."""
    order = uniform.masked_fill(~maskable, 2.0).argsort(dim=1, stable=True)
    chosen = torch.arange(maskable.shape[1], device=maskable.device) < counts[:, None]
    return torch.zeros_like(maskable).scatter(1, order, chosen) & maskable


def stratified_counts(start: Tensor | int, batch: int, length: int) -> Tensor:
    """(batch,) mask counts spread evenly over {1 … length} from a random start in it
    (LLaDA's get_log_likelihood.py: ((round(k + i·T/b) − 1) mod T) + 1)."""
    spread = torch.arange(batch, dtype=torch.float32) * (length / batch)
    return ((torch.round(start + spread).long() - 1) % length) + 1


@torch.no_grad()
def answer_nats(
    model: Model,
    noisy: Tensor,
    clean: Tensor,
    answer: Tensor,
    *,
    mask_id: int,
    cfg_scale: float = 0.0,
    **inputs: Tensor,
) -> Tensor:
    """Σ −log p · T/l of each noised row, (B,): the terms whose mean over masks bounds −log p(answer | prompt).

    Args:
        noisy, clean: (B, L) with exactly the masked answer positions replaced.
        answer: (B, L) bool, True on the T answer tokens.
        inputs: (B, L) each, passed on to the network (segment_ids, for rows with padding).
    """
    masked = (noisy == mask_id) & answer
    context = None if network_block(model) is None else clean
    targets = clean[masked]
    nats = guided_predict(
        model,
        noisy,
        masked,
        ~answer,
        cfg_scale,
        mask_id,
        context,
        read_out=lambda x, weight: token_cross_entropy(x, targets, weight, cfg_scale=cfg_scale),
        **inputs,
    )
    return row_sums(nats, masked) * answer.sum(1) / masked.sum(1)


def row_sums(values: Tensor, where: Tensor) -> Tensor:
    """Sums (B,) by row of values (N,) that stand at the N positions of `where` (B, L)."""
    rows, _ = where.nonzero(as_tuple=True)
    return torch.zeros(len(where), dtype=values.dtype, device=values.device).index_add(0, rows, values)


def log_likelihood(
    model: Model,
    prompt: Tensor,
    answer: Tensor,
    *,
    num_samples: int = 128,
    cfg_scale: float = 0.0,
    mask_id: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 16,
) -> float:
    """A Monte-Carlo lower bound of log p(answer | prompt) in nats (LLaDA's get_log_likelihood.py).

    The mask counts are stratified over all `num_samples`, not batch by batch. A one-token answer is exact with one
    sample.

    Args:
        prompt, answer: (P,) and (T,) integers, or one row (1, …) of them.
        generator: on the CPU; None seeds one with 0.

    Raises:
        UserError: an empty answer, a mask token in either, ids outside of the vocabulary, a row longer than the model's
            context, a number of samples or a guidance that means nothing.
        FloatingPointError: the network's weights or logits are no numbers.
    """
    check_restores_masks(model)
    mask_id = resolve_mask_id(model, mask_id)
    _check_count("log_likelihood", "num_samples", num_samples)
    _check_count("log_likelihood", "batch_size", batch_size)
    require(
        isinstance(cfg_scale, numbers.Real) and 0 <= cfg_scale < math.inf,
        f"log_likelihood: cfg_scale must be a finite number of at least 0, not {shorten(cfg_scale)}",
    )
    prompt, answer = (_one_row(name, ids) for name, ids in (("prompt", prompt), ("answer", answer)))
    require(len(answer) > 0, "log_likelihood: the answer is empty")
    _check_clean("log_likelihood", model, torch.cat([prompt, answer])[None], mask_id)
    check_weights(model)
    generator = generator or torch.Generator().manual_seed(0)
    clean = torch.cat([prompt, answer])
    is_answer = torch.arange(len(clean), device=clean.device) >= len(prompt)
    # Upstream's start is an integer; then rounding half to even prefers even counts wherever i·T/b ends in .5. A real
    # start makes every count uniform on {1 … T}.
    start = torch.rand((), generator=generator) * len(answer) + 0.5
    counts = stratified_counts(start, num_samples, len(answer))
    total = 0.0
    for chunk in counts.split(batch_size):
        rows = clean.expand(len(chunk), -1)
        uniform = torch.rand(rows.shape, generator=generator).to(clean.device)
        masked = mask_exactly(is_answer.expand_as(rows), chunk.to(clean.device), uniform)
        noisy = torch.where(masked, mask_id, rows)
        terms = answer_nats(
            model, noisy, rows, is_answer.expand_as(rows), mask_id=mask_id, cfg_scale=cfg_scale
        )
        total -= float(terms.double().sum())
    if math.isnan(total):
        raise FloatingPointError(
            "log_likelihood: the network's logits are no numbers (NaN); its weights are damaged"
        )
    return total / num_samples


def _one_row(name: str, ids: Tensor) -> Tensor:
    """(N,) int64. Raises UserError for a batch, and for what holds no ids."""
    if (
        not isinstance(ids, Tensor)
        or ids.is_floating_point()
        or (ids.dim() > 1 and ids.numel() != ids.shape[-1])
    ):
        kind = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else shorten(ids)
        if not (isinstance(ids, Tensor) and ids.numel() == 0):  # torch's empty tensor holds floats
            raise UserError(f"log_likelihood: {name} must be a tensor of ids of one row, not {kind}")
    return ids.reshape(-1).long()


def _check_count(function: str, name: str, count: int) -> None:
    require(
        isinstance(count, numbers.Integral) and not isinstance(count, bool) and count >= 1,
        f"{function}: {name} must be an integer of at least 1, not {shorten(count)}",
    )


def _check_clean(function: str, model: Model, tokens: Tensor, mask_id: int) -> None:
    """Refuse a text (B, L) that the network cannot be asked about, or that is masked before we mask it."""
    check_tokens(function, model, tokens, torch.tensor([mask_id]))
    require(
        not bool((tokens == mask_id).any()),
        f"{function}: the text holds the mask token {mask_id}, which has no likelihood; score a text without masks",
    )


@torch.no_grad()
def nelbo_rows(
    model: Model,
    tokens: Tensor,
    maskable: Tensor,
    counts: Tensor,
    keys: Tensor,
    *,
    mask_id: int,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """One unbiased sample of each row's bound in nats, (B,): mask counts[i] of its T maskable tokens, Σ −log p · T/l.

    p gives the mask token no probability (MDLM's SUBS): no text holds it, and the sampler never writes it.

    Args:
        keys: (B,) int64 noise keys of the rows (`noise.row_keys`).
        segment_ids: passed on to the network when given.
    """
    masked = mask_exactly(maskable, counts, row_uniforms(keys, tokens.shape[1]))
    noisy = torch.where(masked, mask_id, tokens)
    inputs = {} if segment_ids is None else {"segment_ids": segment_ids}
    if network_block(model) is not None:
        inputs["context"] = tokens
    targets = tokens[masked]
    nats = predict(
        model,
        noisy,
        masked,
        read_out=lambda x, weight: token_cross_entropy(x, targets, weight, excluded_id=mask_id),
        **inputs,
    )
    return row_sums(nats, masked) * maskable.sum(1) / masked.sum(1).clamp(min=1)


@torch.no_grad()
def bound_samples(
    model: Model,
    tokens: Tensor,
    maskable: Tensor,
    ids: Tensor,
    *,
    num_rows: int,
    num_samples: int,
    mask_id: int,
    segment_ids: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """`num_samples` unbiased samples of each row's bound in nats, (num_samples, B) float64 on the CPU.

    A row's mask counts are stratified over {1 … T}, and the strata are shifted evenly over the rows, so that even one
    sample a row covers all noise levels. The noise is a function of (seed, row id, sample): score rows in any batches,
    on any number of workers.

    Args:
        ids: (B,) int64 in [0, num_rows), the rows' places in the data set.

    Raises FloatingPointError when the network's weights or logits are no numbers.
    """
    check_weights(model)
    start = float(uniforms(stream_key(seed, "likelihood-shift"), torch.zeros(1, dtype=torch.int64))[0])
    shift = (ids.double() / num_rows + start) % 1
    samples = []
    for sample in range(num_samples):
        counts = ((sample + shift) / num_samples * maskable.sum(1)).long() + 1
        keys = row_keys(stream_key(seed, "likelihood", sample), ids)
        nats = nelbo_rows(model, tokens, maskable, counts, keys, mask_id=mask_id, segment_ids=segment_ids)
        samples.append(nats.double().cpu())
    if bool((drawn := torch.stack(samples)).isnan().any()):
        raise FloatingPointError(
            "the bound of a likelihood is no number (NaN): the network's weights are damaged"
        )
    return drawn


def summarise_bound(samples: Tensor, num_tokens: Tensor) -> PerplexityBound:
    """Mean and standard error per token of samples (S, R) over rows of `num_tokens` (R,) scored tokens each."""
    samples, num_tokens = samples[:, num_tokens > 0], num_tokens[num_tokens > 0].double()
    if num_tokens.numel() == 0:
        raise UserError("perplexity_bound: there is no token to score")
    per_row = samples.mean(0)
    mean = float(per_row.sum() / num_tokens.sum())
    # Rows differ in length: the error of the ratio is that of the residuals. One row alone: its samples' spread.
    spread = per_row - mean * num_tokens if len(per_row) > 1 else samples[:, 0]
    error = float(spread.std(correction=1)) if len(spread) > 1 else float("nan")
    return PerplexityBound(mean, error * len(per_row) / float(num_tokens.sum()) / len(spread) ** 0.5)


def perplexity_bound(
    model: Model,
    tokens: Tensor,
    *,
    num_samples: int = 8,
    maskable: Tensor | None = None,
    segment_ids: Tensor | None = None,
    mask_id: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> PerplexityBound:
    """Upper bound of −log p(tokens) per token, with its standard error, in nats.

    Args:
        tokens: (B, L) int64.
        num_samples: masks per row (see `bound_samples`).
        maskable: (B, L) bool, the tokens whose likelihood is bounded; the rest is context. None means all.

    Raises:
        UserError: tokens that are no ids (B, L), mask tokens among those whose likelihood is asked for, ids outside of the
            vocabulary, rows longer than the model's context, a shape of `maskable` that is not the tokens', nothing to
            score, or a number of samples or rows that means nothing.
        FloatingPointError: the network's weights or logits are no numbers.
    """
    check_restores_masks(model)
    _check_count("perplexity_bound", "num_samples", num_samples)
    _check_count("perplexity_bound", "batch_size", batch_size)
    require(
        isinstance(tokens, Tensor) and tokens.dim() == 2 and not tokens.is_floating_point(),
        f"perplexity_bound: tokens are a tensor of ids (B, L), not {shorten(tokens)}",
    )
    require(tokens.numel() > 0, "perplexity_bound: there is no token to score")
    for name, other in (("maskable", maskable), ("segment_ids", segment_ids)):
        require(
            other is None or other.shape == tokens.shape,
            f"perplexity_bound: {name} must have the shape {tuple(tokens.shape)} of the tokens",
        )
    mask_id = resolve_mask_id(model, mask_id)
    check_tokens("perplexity_bound", model, tokens, torch.tensor([mask_id]))
    scored = tokens if maskable is None else tokens[maskable.bool()]
    require(
        not bool((scored == mask_id).any()),
        f"perplexity_bound: the text to score holds the mask token {mask_id}, which has no likelihood",
    )
    maskable = torch.ones_like(tokens, dtype=torch.bool) if maskable is None else maskable.bool()
    samples = [
        bound_samples(
            model,
            tokens[rows],
            maskable[rows],
            rows,
            num_rows=len(tokens),
            num_samples=num_samples,
            mask_id=mask_id,
            segment_ids=None if segment_ids is None else segment_ids[rows],
            seed=seed,
        )
        for rows in torch.arange(len(tokens), device=tokens.device).split(batch_size)
    ]
    return summarise_bound(torch.cat(samples, dim=1), maskable.sum(1).cpu())
