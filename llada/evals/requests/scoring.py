"""Scores of continuations behind their contexts, many at a time: what multiple choice and held-out text are judged by.

A score belongs to its pair and the seed: neither its company in a batch nor who computes it changes it beyond rounding.
Continuations of one context see the same masks, so that what is compared differs by the continuation alone.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llada.diffusion.chain import chain_log_probs, in_first_block
from llada.diffusion.likelihood import answer_nats, mask_exactly
from llada.diffusion.noise import row_keys, row_uniforms, stream_key, uniforms
from llada.evals.autoregressive.likelihood import is_causal, judge_next_tokens
from llada.model.predict import (
    Model,
    check_tokens,
    check_weights,
    device_of,
    guide,
    guided_predict,
    network_block,
    resolve_mask_id,
)
from llada.settings import check_limits, limited, require

T = TypeVar("T")


@dataclass(frozen=True)
class ScoreConfig:
    """How log p(continuation | context) is estimated. An autoregressive network's is exact, whatever stands here but guidance, which
    it cannot have."""

    rule: Literal["monte_carlo", "left_to_right", "confidence"] = "monte_carlo"
    """The mean over random masks, a lower bound (LLaDA Eq. 6); or the chain rule along an order (llada/diffusion/chain.py), which
    takes a forward for each token. Of a continuation of one token they are the same number, with one forward."""
    num_samples: int = limited(128, low=1)
    """Of "monte_carlo": masks of a continuation."""
    cfg_scale: float = limited(0.0, low=0)
    """Strength of the unsupervised classifier-free guidance."""
    max_tokens: int = limited(8192, low=1)
    """Tokens that one forward is fed, at least one row."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_limits(self, "score")


class Pair(NamedTuple):
    """Token ids."""

    context: Sequence[int]
    continuation: Sequence[int]
    noise_of: Sequence[int] | None = None
    """The context, or whatever else, whose masks it has; None: its own context's. For choices that are contexts of one continuation,
    contexts that are cut, and texts that all stand behind the same token."""


def num_forwards(model: Model, pair: Pair, config: ScoreConfig) -> int:
    """Rows that the estimate of a pair takes; what `is_greedy` takes besides is not counted."""
    T = len(pair.continuation)
    if is_causal(model):
        return min(T, 1)
    return T if config.rule != "monte_carlo" or T <= 1 else config.num_samples


class Score(NamedTuple):
    """What is known of a pair."""

    log_p: float
    """In nats; an empty continuation has 0."""
    is_greedy: bool
    """Whether the network would write the continuation itself, its surest token first."""


class _Batch(NamedTuple):
    """Rows of several pairs, padded on the right to (B, L)."""

    tokens: Tensor
    scored: Tensor
    segments: dict[str, Tensor]
    """segment_ids, where there is padding: it is a document of its own, which nothing else sees."""


class _Room(NamedTuple):
    """What one forward may be fed, but at least one row (with guidance, and its copy without a context)."""

    tokens: int
    rows: int | None

    def rows_of(self, length: int) -> int:
        """The most rows of so many tokens."""
        rows = self.tokens // length
        return max(1, rows if self.rows is None else min(rows, self.rows))


def score_pairs(
    model: Model,
    pairs: Sequence[Pair],
    config: ScoreConfig = ScoreConfig(),
    *,
    max_rows: int | None = None,
) -> list[Score]:
    """The scores of the pairs in their order.

    Args:
        max_rows: of a forward, guidance's copies not counted; None: as many as `config.max_tokens` allows.

    Raises:
        UserError: a mask token in a continuation, ids outside of the vocabulary, a pair longer than the context; of an
            autoregressive network guidance, and a continuation without a context.
        FloatingPointError: the network's weights or logits are no numbers.
    """
    room = _Room(config.max_tokens, max_rows)
    if is_causal(model):
        return _score_exactly(model, pairs, config, room)
    mask_id = resolve_mask_id(model, None)
    check_weights(model)
    for pair in pairs:
        check_tokens("score_pairs", model, torch.tensor([[*pair.context, *pair.continuation]]))
        require(
            mask_id not in pair.continuation,
            f"score_pairs: a continuation holds the mask token {mask_id}, which has no likelihood",
        )
    log_p, is_greedy = [0.0] * len(pairs), [True] * len(pairs)
    asked = sorted(
        (number for number, pair in enumerate(pairs) if len(pair.continuation)),
        key=lambda number: (_length(pairs[number]), number),
    )
    by_chain = [n for n in asked if config.rule != "monte_carlo" or len(pairs[n].continuation) == 1]
    for numbers in _batches(by_chain, [_length(pairs[n]) for n in by_chain], room):
        batch = _pack([pairs[n] for n in numbers], device_of(model))
        found = chain_log_probs(
            model,
            batch.tokens,
            batch.scored,
            order="confidence" if config.rule == "confidence" else "left_to_right",
            mask_id=mask_id,
            cfg_scale=config.cfg_scale,
            max_rows=room.rows_of(batch.tokens.shape[1]),
            **batch.segments,
        )
        for number, score in zip(numbers, found.sum(1).tolist(), strict=True):
            log_p[number] = score
    sampled = [n for n in asked if n not in set(by_chain)]
    for number, score in _sample(model, pairs, sampled, config, room, mask_id):
        log_p[number] += score / config.num_samples
    for numbers in _batches(asked, [_length(pairs[n]) for n in asked], room):
        batch = _pack([pairs[n] for n in numbers], device_of(model))
        for number, same in zip(numbers, _greedy(model, batch, config.cfg_scale, mask_id), strict=True):
            is_greedy[number] = same
    if np.isnan(log_p).any():
        raise FloatingPointError("a score is no number (NaN): the network's logits or weights are damaged")
    return [Score(*score) for score in zip(log_p, is_greedy, strict=True)]


def _score_exactly(model: Model, pairs: Sequence[Pair], config: ScoreConfig, room: _Room) -> list[Score]:
    require(
        config.cfg_scale == 0,
        f"score_pairs: cfg_scale={config.cfg_scale} masks the context, and an autoregressive network knows no mask: leave it out",
    )
    scores = [Score(0.0, True)] * len(pairs)
    asked = sorted(
        (number for number, pair in enumerate(pairs) if len(pair.continuation)),
        key=lambda number: (_length(pairs[number]), number),
    )
    for number in asked:
        pair = pairs[number]
        check_tokens("score_pairs", model, torch.tensor([[*pair.context, *pair.continuation]]))
        require(
            len(pair.context) > 0,
            "score_pairs: a continuation has no context, and an autoregressive network scores no first token",
        )
    for numbers in _batches(asked, [_length(pairs[n]) for n in asked], room):
        batch = _pack([pairs[n] for n in numbers], device_of(model))
        # Padding stands on the right, where a causal network does not look.
        found = judge_next_tokens(model, batch.tokens, batch.scored)
        nats, greedy = found.nats.sum(1).tolist(), found.is_likeliest.all(1).tolist()
        for number, cost, same in zip(numbers, nats, greedy, strict=True):
            scores[number] = Score(-cost, same)
    return scores


def _sample(
    model: Model,
    pairs: Sequence[Pair],
    numbers: Sequence[int],
    config: ScoreConfig,
    room: _Room,
    mask_id: int,
) -> Iterator[tuple[int, float]]:
    """(pair, −Σ nats · T/l) of each mask of each pair of `numbers`, which are in the order of their lengths."""
    rows = [(number, sample) for number in numbers for sample in range(config.num_samples)]
    for some in _batches(rows, [_length(pairs[number]) for number, _ in rows], room):
        batch = _pack([pairs[number] for number, _ in some], device_of(model))
        noise, counts = torch.ones(batch.tokens.shape), torch.empty(len(some), dtype=torch.int64)
        begin = 0
        for number, group in itertools.groupby(some, key=lambda row: row[0]):
            pair, samples = pairs[number], torch.tensor([sample for _, sample in group])
            rows_of_pair = slice(begin, begin := begin + len(samples))
            places = slice(len(pair.context), _length(pair))
            noise[rows_of_pair, places], counts[rows_of_pair] = _noise(pair, samples, config)
        device = batch.tokens.device
        masked = mask_exactly(batch.scored, counts.to(device), noise.to(device))
        nats = answer_nats(
            model,
            torch.where(masked, mask_id, batch.tokens),
            batch.tokens,
            batch.scored,
            mask_id=mask_id,
            cfg_scale=config.cfg_scale,
            **batch.segments,
        )
        yield from zip((number for number, _ in some), (-nats.double()).tolist(), strict=True)


def _noise(pair: Pair, samples: Tensor, config: ScoreConfig) -> tuple[Tensor, Tensor]:
    """Uniforms (S, T) of the samples (S,) int64, and how many of the T tokens each masks (S,), stratified over {1 … T}.

    The k-th token of every continuation of a context (`Pair.noise_of`) has the same uniform.
    """
    T = len(pair.continuation)
    own = pair.context if pair.noise_of is None else pair.noise_of
    context = np.asarray(own, dtype=np.int64).tobytes()
    digest = int.from_bytes(hashlib.blake2b(context, digest_size=8).digest(), "big", signed=True)
    start = uniforms(stream_key(config.seed, "score", digest), torch.zeros(1, dtype=torch.int64))
    counts = ((samples + start) / config.num_samples * T).long().clamp(max=T - 1) + 1
    keys = row_keys(stream_key(config.seed, "score-mask", digest), samples)
    return row_uniforms(keys, T), counts


@torch.no_grad()
def _greedy(model: Model, batch: _Batch, cfg_scale: float, mask_id: int) -> list[bool]:
    """Whether each row's scored tokens are those that come of committing the surest token of all masks, again and again."""
    masked, same = batch.scored.clone(), torch.ones(len(batch.scored), dtype=torch.bool)
    while len(rows := (masked.any(1).cpu() & same).nonzero()[:, 0].to(masked.device)):
        hidden, clean = masked[rows], batch.tokens[rows]
        at = hidden & in_first_block(hidden, network_block(model))
        found = guided_predict(
            model,
            torch.where(hidden, mask_id, clean),
            at,
            ~batch.scored[rows],
            cfg_scale,
            mask_id,
            None if network_block(model) is None else clean,
            read_out=lambda x, weight: _surest(x, weight, cfg_scale, mask_id),
            **{name: value[rows] for name, value in batch.segments.items()},
        )
        log_p = torch.full(hidden.shape, -torch.inf, dtype=torch.float64, device=masked.device)
        ids = torch.zeros_like(clean)
        log_p[at], ids[at] = found[:, 0], found[:, 1].long()
        best = log_p.argmax(1, keepdim=True)
        same[rows.cpu()] = (ids.gather(1, best) == clean.gather(1, best))[:, 0].cpu()
        masked[rows, best[:, 0]] = False
    return same.tolist()


def _surest(x: Tensor, weight: Tensor | None, cfg_scale: float, mask_id: int) -> Tensor:
    """(N, 2) float64: log p and id of each position's likeliest token, never the mask. A slice of the logits is there at a time."""
    N = len(x) // 2 if cfg_scale else len(x)
    pieces = []
    for part in torch.arange(N, device=x.device).split(256):
        given = torch.cat([x[part], x[part + N]]) if cfg_scale else x[part]
        logits = given if weight is None else F.linear(given, weight.to(given.dtype))
        logits = (guide(logits, cfg_scale) if cfg_scale else logits).double()
        logits[:, mask_id] = -torch.inf
        top, ids = logits.max(1)
        pieces.append(torch.stack([top - logits.logsumexp(1), ids.double()], 1))
    return torch.cat(pieces)


def _length(pair: Pair) -> int:
    return len(pair.context) + len(pair.continuation)


def _batches(things: Sequence[T], lengths: Sequence[int], room: _Room) -> Iterator[list[T]]:
    """Things with ascending lengths in groups whose padded rows have room in a forward, at least one thing each."""
    group: list[T] = []
    for thing, length in zip(things, lengths, strict=True):
        if len(group) >= room.rows_of(length):
            yield group
            group = []
        group.append(thing)
    if group:
        yield group


def _pack(pairs: Sequence[Pair], device: torch.device | None) -> _Batch:
    length = max(map(_length, pairs))
    tokens = torch.zeros(len(pairs), length, dtype=torch.int64)
    scored = torch.zeros(len(pairs), length, dtype=torch.bool)
    padding = torch.zeros(len(pairs), length, dtype=torch.int64)
    for row, pair in enumerate(pairs):
        begin, end = len(pair.context), _length(pair)
        tokens[row, :end] = torch.tensor([*pair.context, *pair.continuation])
        scored[row, begin:end] = True
        padding[row, end:] = 1
    segments = {"segment_ids": padding.to(device)} if bool(padding.any()) else {}
    return _Batch(tokens.to(device), scored.to(device), segments)
