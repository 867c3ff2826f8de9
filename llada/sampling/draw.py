"""Tokens and confidences from logits (N, V): what of the vocabulary's width is looked at, once and in slices.

V is the widest thing in a step (126,464 for LLaDA): nothing here copies the logits as a whole or in float64, but for
the rows that are drawn with a temperature. Sums are float64, and what is near 1 is computed from what is missing there,
so that confidences can be ranked where float32 would call them all 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llada.diffusion.noise import row_keys, stream_key, wide_uniforms

_DRAW = stream_key(0, "draw")
_SLICE = 1 << 23  # numbers that are worked on at a time
_FLOOR = -1e30  # an exponent that is zero, and no infinity


def _slices(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _SLICE // max(1, logits.shape[1]))
    for begin in range(0, len(logits), rows):
        yield slice(begin, begin + rows)


def confidence(logits: Tensor, tokens: Tensor, impossible: Tensor | None = None) -> Tensor:
    """(N,) float64: softmax(logits)[tokens]; with the ids `impossible` (N, n) at −∞."""
    out = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    tokens = tokens.to(logits.device)
    for part in _slices(logits):
        some, token = _without(logits, part, impossible), tokens[part, None]
        # 1 / (1 + rest): the odds of all others keep their digits where the probability itself is 1 − 1e-9.
        own = some.gather(1, token)
        highest = some.amax(1, keepdim=True).clamp(min=_FLOOR)
        odds = (some - highest).exp_().scatter_(1, token, 0.0).sum(1, dtype=torch.float64)
        ahead = (highest.double() - own.double()).squeeze(1).exp_()
        # Of an impossible token the rest is infinite, or, where nothing at all is possible, 0 · ∞.
        out[part] = odds.mul_(ahead).add_(1).reciprocal_().nan_to_num_(0.0)
    return out


def two_likeliest(logits: Tensor, impossible: Tensor | None = None) -> Tensor:
    """(N, 2) float64: the two highest probabilities of softmax(logits); with the ids `impossible` (N, n) at −∞."""
    out = torch.empty(len(logits), 2, dtype=torch.float64, device=logits.device)
    for part in _slices(logits):
        values, ids = _without(logits, part, impossible).topk(2)
        values = values.double().clamp(min=_FLOOR)
        first = confidence(logits[part], ids[:, 0], None if impossible is None else impossible[part])
        out[part] = first[:, None] * (values - values[:, :1]).exp()
    return out


def likeliest_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(N, count) ids of the highest probabilities of softmax(logits), the highest first, and the probabilities' logarithms in
    float64; all V where there are no more."""
    ids, log_probs = [], []
    for part in _slices(logits):
        some = logits[part]
        values, own = some.topk(min(count, some.shape[1]))
        highest = values[:, :1].clamp(min=_FLOOR)
        total = (some - highest).exp_().sum(1, keepdim=True, dtype=torch.float64).log_()
        ids.append(own)
        log_probs.append(values.double() - highest.double() - total)
    return torch.cat(ids), torch.cat(log_probs)


def _without(logits: Tensor, part: slice, impossible: Tensor | None) -> Tensor:
    if impossible is None:
        return logits[part]
    return logits[part].scatter(1, impossible[part].to(logits.device), -torch.inf)


def certainty(logits: Tensor) -> Tensor:
    """(N,) float64: minus the entropy of softmax(logits), in nats."""
    out = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    for part in _slices(logits):
        shifted = logits[part] - logits[part].amax(1, keepdim=True)
        weights = shifted.exp()
        total = weights.sum(1, dtype=torch.float64)
        mean = weights.mul_(shifted.clamp_(min=_FLOOR)).sum(1, dtype=torch.float64) / total
        out[part] = mean - total.log()
    return out


class Cut(NamedTuple):
    """What of softmax(logits / temperature) is not drawn, each (N,): a token is kept that passes all three, and so is
    what is as likely as the least likely one that does. Where the temperature is 0 nothing is cut: the likeliest is
    taken in any case."""

    top_k: Tensor
    """Keep so many of the likeliest tokens; 0 keeps all."""
    top_p: Tensor
    """Keep the fewest of the likeliest tokens that together have this probability, at least one; 1 keeps all."""
    min_p: Tensor
    """Keep what is at least this times as likely as the likeliest token; 0 keeps all."""


def draw_tokens(
    logits: Tensor,
    temperature: float | Tensor,
    keys: Tensor | None,
    rounding: float | Tensor = 0.0,
    *,
    cut: Cut | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """argmax(logits + temperature · Gumbel noise): samples of softmax(logits / temperature), (N,) from (N, V).

    In float64 where there is noise, because low-precision Gumbel noise truncates the tail and lowers the effective
    temperature (arXiv 2409.02908). `keys` (N,) are what it is a function of; None will do where no temperature is. Values are equal, and the lowest id is taken,
    within `rounding` per unit of the highest one. `temperature` and `rounding` may be (N,).

    `uniform` (N,): where it is a number in [0, 1), and not NaN, the token is the one at which the probabilities, summed in
    the order of the ids, exceed it.
    """
    device, count = logits.device, len(logits)
    temperature = torch.as_tensor(temperature, dtype=torch.float64).expand(count)
    rounding = torch.as_tensor(rounding, dtype=torch.float64).expand(count).to(device)
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    is_drawn = temperature != 0
    if not bool(is_drawn.all()):
        for part in _slices(logits):
            tokens[part] = likeliest(logits[part], logits[part].amax(1, keepdim=True), rounding[part])
    if not bool(is_drawn.any()):
        return tokens
    assert keys is not None
    if uniform is None:
        uniform = torch.full((count,), torch.nan, dtype=torch.float64)
    if cut is not None and not bool(((cut.top_k > 0) | (cut.top_p < 1) | (cut.min_p > 0)).any()):
        cut = None
    size = max(1, _SLICE // max(1, logits.shape[1]))
    for is_summed in (False, True):
        rows = (is_drawn & (uniform.isnan() != is_summed)).nonzero().squeeze(1)
        for own in rows.split(size) if len(rows) else ():
            some, heat = own.to(device), temperature[own, None].to(device)
            values = logits[some].double()
            if cut is not None:
                own_cut = Cut(*(limit[own, None].to(device) for limit in cut))
                values = _keep_likely(values, heat, rounding[some, None], own_cut)
            if is_summed:
                tokens[some] = _by_sum(values / heat, uniform[own, None].to(device))
            else:
                noise = wide_uniforms(row_keys(_DRAW, keys.to(device)[some]), logits.shape[1])
                values -= heat * torch.log(-torch.log(noise))
                tokens[some] = likeliest(values, values.amax(1, keepdim=True), rounding[some])
    return tokens


def likeliest(logits: Tensor, highest: Tensor, rounding: Tensor) -> Tensor:
    """(N,) the lowest ids of (N, V) that are equal to the highest values (N, 1) within `rounding` (N,) per unit of them."""
    rounding = rounding.to(logits.device)[:, None] * (1 + highest.abs())
    lowest = highest - rounding.to(logits.dtype)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for part in _slices(logits):
        tokens[part] = (logits[part] >= lowest[part]).to(torch.int8).argmax(1)
    return tokens


def _by_sum(logits: Tensor, uniform: Tensor) -> Tensor:
    """(n,): the first ids of (n, V) at which the sum of the probabilities exceeds `uniform` (n, 1)."""
    sums = logits.softmax(1).cumsum(1)
    # A hair below the whole, which rounding must not reach: behind the last possible id there may be impossible ones.
    return torch.searchsorted(sums, uniform * (sums[:, -1:] * (1 - 2.0**-50)), right=True).squeeze(1)


def _keep_likely(logits: Tensor, temperature: Tensor, rounding: Tensor, cut: Cut) -> Tensor:
    """The logits (n, V) float64, at −∞ what is cut; all other arguments (n, 1)."""
    best = logits.amax(1, keepdim=True)
    lowest = best + temperature * cut.min_p.double().log()
    if bool(((cut.top_k > 0) | (cut.top_p < 1)).any()):
        ranked = logits.sort(dim=1, descending=True).values
        probs = (ranked / temperature).softmax(1)
        # A sum that misses top_p by no more than float32 could tell has reached it.
        reaching = ((probs.cumsum(1) - probs < cut.top_p - 1e-6) | (cut.top_p >= 1)).sum(1, keepdim=True)
        count = torch.where(cut.top_k > 0, torch.minimum(cut.top_k, reaching), reaching).clamp(min=1)
        lowest = torch.maximum(lowest, ranked.gather(1, count - 1))
    return logits.masked_fill(logits < lowest - rounding * (1 + best.abs()), -torch.inf)
