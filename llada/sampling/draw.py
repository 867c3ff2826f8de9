"""Tokens and confidences from logits (N, V): what of the vocabulary's width is looked at, once and in slices.

V is the widest thing in a step (126,464 for LLaDA): nothing here copies the logits as a whole or in float64, but for the rows
that are drawn with a temperature. Sums are float64, and what is near 1 is computed from what is missing there, so that
confidences can be ranked where float32 would call them all 1.
"""

from __future__ import annotations

from collections.abc import Iterator

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


def confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """(N,) float64: softmax(logits)[tokens]."""
    out = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    for part in _slices(logits):
        some, token = logits[part], tokens[part, None]
        # 1 / (1 + rest): the odds of all others keep their digits where the probability itself is 1 − 1e-9.
        own = some.gather(1, token)
        highest = some.amax(1, keepdim=True).clamp(min=_FLOOR)
        odds = (some - highest).exp_().scatter_(1, token, 0.0).sum(1, dtype=torch.float64)
        out[part] = 1 / (1 + odds * (highest.double() - own.double()).squeeze(1).exp())
    return out


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


def draw_tokens(
    logits: Tensor, temperature: float | Tensor, keys: Tensor, rounding: float | Tensor = 0.0
) -> Tensor:
    """argmax(logits + temperature · Gumbel noise): samples of softmax(logits / temperature), (N,) from (N, V).

    In float64 where there is noise, because low-precision Gumbel noise truncates the tail and lowers the effective
    temperature (arXiv 2409.02908). `keys` (N,) are what it is a function of. Values are equal, and the lowest id is taken,
    within `rounding` per unit of the highest one. `temperature` and `rounding` may be (N,).
    """
    device, count = logits.device, len(logits)
    temperature = torch.as_tensor(temperature, dtype=torch.float64).expand(count)
    rounding = torch.as_tensor(rounding, dtype=torch.float64).expand(count).to(device)
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    is_drawn = temperature != 0
    if not bool(is_drawn.all()):
        for part in _slices(logits):
            tokens[part] = _highest(logits[part], rounding[part])
    rows = is_drawn.nonzero().squeeze(1).to(device)
    for some in rows.split(max(1, _SLICE // max(1, logits.shape[1]))):
        uniform = wide_uniforms(row_keys(_DRAW, keys.to(device)[some]), logits.shape[1])
        noise = temperature.to(device)[some, None] * torch.log(-torch.log(uniform))
        tokens[some] = _highest(logits[some] - noise, rounding[some])
    return tokens


def _highest(values: Tensor, rounding: Tensor) -> Tensor:
    best = values.amax(1, keepdim=True)
    lowest = best - (rounding[:, None] * (1 + best.abs())).to(values.dtype)
    return (values >= lowest).to(torch.int8).argmax(1)


def keep_likely(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The logits (N, V), at −∞ what is cut from softmax(logits / temperature); the most likely is never cut.

    Args:
        temperature: (N,); where it is 0 nothing is cut, because the most likely token is taken in any case.
        top_k: (N,) keep so many, and what is as likely as the last of them; 0 keeps all.
        top_p: (N,) keep the fewest most likely tokens that together have this probability; 1 keeps all.
        min_p: (N,) keep what is at least this times as likely as the most likely token; 0 keeps all.
    """
    is_cut = (temperature != 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    rows = is_cut.nonzero().squeeze(1)
    if not len(rows):
        return logits
    temperature, top_k, top_p, min_p = (
        x[rows, None].to(logits.device) for x in (temperature, top_k, top_p, min_p)
    )
    rows = rows.to(logits.device)
    ranked, order = (logits[rows] / temperature).sort(dim=1, descending=True)
    place = torch.where(top_k > 0, top_k.clamp(max=ranked.shape[1]), ranked.shape[1]) - 1
    keep = ranked >= ranked.gather(1, place)
    probs = ranked.softmax(1)
    keep &= (probs.cumsum(1) - probs < top_p) | (top_p >= 1)
    keep &= ranked >= ranked[:, :1] + min_p.log()
    keep[:, 0] = True
    kept = torch.zeros_like(keep).scatter_(1, order, keep)
    return logits.index_copy(0, rows, logits[rows].masked_fill(~kept, -torch.inf))
