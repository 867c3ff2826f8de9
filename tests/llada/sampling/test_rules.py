"""The rules that choose positions, against their definitions spelled out by brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada.sampling.rules import (
    by_entropy,
    by_factor,
    by_quota,
    by_threshold,
    quota_schedule,
    split_steps,
)

confidences = st.lists(st.floats(0, 1, allow_nan=False, width=32), min_size=1, max_size=12, unique=True).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
# Multiples of 1/64: sums are exact, so that "≤ bound" does not hang on rounding.
entropies = st.lists(st.integers(0, 256), min_size=1, max_size=12, unique=True).map(
    lambda values: torch.tensor(values, dtype=torch.float64) / 64
)
quick = settings(max_examples=150, deadline=None, derandomize=True)


def positions(chosen: Tensor) -> set[int]:
    return set(chosen.nonzero().flatten().tolist())


def test_quota_gives_the_remainder_to_the_first_steps() -> None:
    assert quota_schedule(10, 4) == [3, 3, 2, 2]
    assert quota_schedule(8, 4) == [2, 2, 2, 2]
    assert quota_schedule(3, 5) == [1, 1, 1, 0, 0]


@given(st.integers(0, 200), st.integers(1, 60))
@quick
def test_quotas_add_up_and_never_grow(masks: int, steps: int) -> None:
    quotas = quota_schedule(masks, steps)
    assert len(quotas) == steps
    assert sum(quotas) == masks
    assert quotas == sorted(quotas, reverse=True)
    assert quotas[0] - quotas[-1] <= 1


@pytest.mark.parametrize(
    ("steps", "blocks", "expected"), [(8, 4, [2] * 4), (7, 3, [3, 2, 2]), (2, 4, [1] * 4), (5, 1, [5])]
)
def test_steps_are_shared_out_among_blocks(steps: int, blocks: int, expected: list[int]) -> None:
    assert split_steps(steps, blocks) == expected


@given(confidences, st.integers(1, 15))
@quick
def test_by_quota_takes_the_most_confident(confidence: Tensor, quota: int) -> None:
    chosen = positions(by_quota(confidence, quota))
    assert len(chosen) == min(quota, len(confidence))
    left_out = set(range(len(confidence))) - chosen
    assert all(confidence[i] > confidence[j] for i in chosen for j in left_out)


@given(confidences, st.floats(0, 1.2))
@quick
def test_by_threshold_is_its_definition(confidence: Tensor, threshold: float) -> None:
    expected = {i for i, c in enumerate(confidence.tolist()) if c >= threshold} or {int(confidence.argmax())}
    assert positions(by_threshold(confidence, threshold)) == expected


@given(confidences, st.floats(0, 3))
@quick
def test_by_factor_is_its_definition(confidence: Tensor, factor: float) -> None:
    ranked = sorted(range(len(confidence)), key=lambda i: -float(confidence[i]))
    n = 1
    while n < len(ranked) and float(confidence[ranked[n]]) >= 1 - factor / (n + 2):
        n += 1
    assert positions(by_factor(confidence, factor)) == set(ranked[:n])


@given(entropies, st.integers(0, 400).map(lambda n: n / 64))
@quick
def test_by_entropy_is_its_definition(entropy: Tensor, bound: float) -> None:
    ranked = sorted(range(len(entropy)), key=lambda i: float(entropy[i]))
    fits = [k for k in range(1, len(ranked) + 1) if sum(float(entropy[i]) for i in ranked[: k - 1]) <= bound]
    assert positions(by_entropy(entropy, bound)) == set(ranked[: max(fits)])


def test_rules_on_worked_examples() -> None:
    confidence = torch.tensor([0.2, 0.99, 0.7, 0.65])
    assert positions(by_factor(confidence, 1.0)) == {1, 2}  # 0.7 ≥ 1 − 1/3, 0.65 < 1 − 1/4
    assert positions(by_factor(torch.tensor([0.99, 0.2]), 1.0)) == {0}  # the last failing rank stays out
    assert positions(by_factor(torch.tensor([0.1, 0.2]), 0.0)) == {1}
    assert positions(by_threshold(confidence, 0.7 - 1e-6)) == {1, 2}
    entropy = torch.tensor([0.5, 0.125, 2.0, 0.25])
    assert positions(by_entropy(entropy, 0.0)) == {1}
    assert positions(by_entropy(entropy, 0.125)) == {1, 3}
    assert positions(by_entropy(entropy, 0.375)) == {1, 3, 0}
    assert positions(by_entropy(entropy, 0.874)) == {1, 3, 0}
    assert positions(by_entropy(entropy, 0.875)) == {0, 1, 2, 3}
