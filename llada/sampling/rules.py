"""Which masked positions to commit at a step. Each rule is a function of one row's candidates.

A rule sees the confidences of the positions that may be committed now and returns which of them are. Every rule commits
at least one, so that the loop cannot spin (the ancestral sampler, whose steps are counted, may pick none).
"""

from __future__ import annotations

import torch
from torch import Tensor


def quota_schedule(masks: int, steps: int) -> list[int]:
    """How many to commit at each step: masks // steps, and one more in the first masks % steps (LLaDA generate.py)."""
    return [masks // steps + (step < masks % steps) for step in range(steps)]


def split_steps(steps: int, blocks: int) -> list[int]:
    """Steps of each block: as equal as they can be, the first ones longer; at least one."""
    return [max(1, n) for n in quota_schedule(steps, blocks)]


def by_quota(confidence: Tensor, quota: int) -> Tensor:
    """The `quota` most confident positions. confidence (N,) -> bool (N,)."""
    chosen = torch.zeros_like(confidence, dtype=torch.bool)
    chosen[confidence.topk(min(quota, len(confidence))).indices] = True
    return chosen


def by_threshold(confidence: Tensor, threshold: float) -> Tensor:
    """All positions with confidence ≥ threshold, the best one in any case (Fast-dLLM, arXiv 2505.22618)."""
    chosen = confidence >= threshold
    chosen[confidence.argmax()] = True
    return chosen


def by_factor(confidence: Tensor, factor: float) -> Tensor:
    """The longest prefix n of the ranking with c₍ₙ₎ ≥ 1 − factor/(n + 1), at least 1 (Fast-dLLM's factor rule)."""
    ranked, order = confidence.sort(descending=True)
    rank = torch.arange(1, len(ranked) + 1, device=ranked.device)
    passed = ranked >= 1 - factor / (rank + 1)
    passed[0] = True
    chosen = torch.zeros_like(passed)
    chosen[order] = passed.cumprod(0).bool()
    return chosen


def by_entropy(entropy: Tensor, bound: float) -> Tensor:
    """The largest k of the most certain positions with Σ_{i≤k} H_i − H_k ≤ bound, at least 1 (arXiv 2505.24857).

    The left side bounds the dependence among the committed tokens, in nats.
    """
    ranked, order = entropy.sort()
    passed = ranked.cumsum(0) - ranked <= bound
    passed[0] = True
    chosen = torch.zeros_like(passed)
    chosen[order] = passed.cumprod(0).bool()
    return chosen
