"""The rules that choose positions, against their definitions spelled out by brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada.diffusion.schedule import get_schedule
from llada.errors import UserError
from llada.sampling.config import SamplingConfig
from llada.sampling.rules import (
    RULES,
    Rule,
    above,
    by_entropy,
    by_factor,
    find_rule,
    highest,
    unmask_probability,
    unmasked_by,
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
    """Of a table of one row."""
    (row,) = chosen
    return set(row.nonzero().flatten().tolist())


def padded(values: Tensor) -> Tensor:
    """A table of one row, with two empty slots behind its candidates."""
    return torch.nn.functional.pad(values[None], (0, 2), value=-torch.inf)


@given(confidences, st.integers(1, 15))
@quick
def test_highest_takes_the_most_confident(confidence: Tensor, quota: int) -> None:
    chosen = positions(highest(padded(confidence), torch.tensor([min(quota, len(confidence))])))
    assert len(chosen) == min(quota, len(confidence))
    left_out = set(range(len(confidence))) - chosen
    assert all(confidence[i] > confidence[j] for i in chosen for j in left_out)


@given(confidences, st.floats(0, 1.2))
@quick
def test_above_is_its_definition(confidence: Tensor, threshold: float) -> None:
    expected = {i for i, c in enumerate(confidence.tolist()) if c >= threshold} or {int(confidence.argmax())}
    assert positions(above(padded(confidence), threshold)) == expected


@given(confidences, st.floats(0, 3))
@quick
def test_by_factor_is_its_definition(confidence: Tensor, factor: float) -> None:
    ranked = sorted(range(len(confidence)), key=lambda i: -float(confidence[i]))
    n = 1
    while n < len(ranked) and float(confidence[ranked[n]]) >= 1 - factor / (n + 2):
        n += 1
    assert positions(by_factor(padded(confidence), factor)) == set(ranked[:n])


@given(entropies, st.integers(0, 400).map(lambda n: n / 64))
@quick
def test_by_entropy_is_its_definition(entropy: Tensor, bound: float) -> None:
    ranked = sorted(range(len(entropy)), key=lambda i: float(entropy[i]))
    fits = [k for k in range(1, len(ranked) + 1) if sum(float(entropy[i]) for i in ranked[: k - 1]) <= bound]
    assert positions(by_entropy(padded(-entropy), bound)) == set(ranked[: max(fits)])


def test_rules_on_worked_examples() -> None:
    confidence = torch.tensor([0.2, 0.99, 0.7, 0.65])
    assert positions(by_factor(padded(confidence), 1.0)) == {1, 2}  # 0.7 ≥ 1 − 1/3, 0.65 < 1 − 1/4
    assert positions(by_factor(torch.tensor([[0.99, 0.2]]), 1.0)) == {0}  # the last failing rank stays out
    assert positions(by_factor(torch.tensor([[0.1, 0.2]]), 0.0)) == {1}
    assert positions(above(padded(confidence), 0.7 - 1e-6)) == {1, 2}
    entropy = torch.tensor([0.5, 0.125, 2.0, 0.25])
    assert positions(by_entropy(padded(-entropy), 0.0)) == {1}
    assert positions(by_entropy(padded(-entropy), 0.125)) == {1, 3}
    assert positions(by_entropy(padded(-entropy), 0.375)) == {1, 3, 0}
    assert positions(by_entropy(padded(-entropy), 0.874)) == {1, 3, 0}
    assert positions(by_entropy(padded(-entropy), 0.875)) == {0, 1, 2, 3}


def test_rows_of_a_table_do_not_see_each_other() -> None:
    """Each rule on a ragged table is the rule on its rows alone; of equals the lower column is taken."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(n, generator=generator, dtype=torch.float64) for n in (1, 7, 4, 12)]
    rows.append(torch.full((5,), 0.5, dtype=torch.float64))
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-torch.inf)
    quota = torch.tensor([1, 3, 2, 5, 2])
    for rule in (
        lambda t, q: highest(t, q),
        lambda t, _: above(t, 0.6),
        lambda t, _: by_factor(t, 0.8),
        lambda t, _: by_entropy(t - 1, 0.4),
    ):
        together = rule(table, quota)
        for r, row in enumerate(rows):
            assert torch.equal(together[r, : len(row)], rule(row[None], quota[r : r + 1])[0])
    assert positions(highest(rows[4][None], quota[4:])) == {0, 1}


def test_settings_find_their_rule() -> None:
    assert find_rule(SamplingConfig()) is RULES["low_confidence"]
    assert find_rule(SamplingConfig(threshold=0.9)) is RULES["threshold"]
    assert find_rule(SamplingConfig(threshold=0.9, remasking="threshold")) is RULES["threshold"]
    assert find_rule(SamplingConfig(entropy_bound=0.0)) is RULES["entropy"]
    for bad, message in (
        ({"remasking": "low_confidense"}, "did you mean 'low_confidence'"),
        ({"remasking": "factor"}, "remasking='factor' needs the setting factor"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold and factor"),
        ({"factor": 1.0, "remasking": "random"}, "choose one rule"),
        ({"threshold": float("nan")}, "threshold must be a finite number"),
    ):
        with pytest.raises(UserError, match=message):
            SamplingConfig(**bad)


def test_a_rule_named_beside_its_knob_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """One from outside may share the knob of one of ours."""
    monkeypatch.setattr(RULES, "_entries", dict(RULES._entries))
    mine = RULES.register("mine")(Rule(lambda c: c.confidence >= c.knob, knob="threshold"))
    assert find_rule(SamplingConfig(remasking="mine", threshold=0.9)) is mine
    assert find_rule(SamplingConfig(threshold=0.9)) is RULES["threshold"]


def test_unmask_probability_is_equation_7() -> None:
    for name in ("loglinear", "cosine2", "geometric"):
        schedule = get_schedule(name)
        t, s = torch.tensor([0.7, 0.4], dtype=torch.float64)
        expected = (schedule.alpha(s) - schedule.alpha(t)) / (1 - schedule.alpha(t))
        assert float(unmask_probability(schedule, t, s)) == pytest.approx(float(expected))


@pytest.mark.parametrize("name", ["loglinear", "cosine", "geometric"])
def test_coins_of_all_steps_are_one_number(name: str) -> None:
    """P(unmasked by step k) is what independent coins with MDLM's chances at each step give."""
    schedule, steps = get_schedule(name), 7
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    chance = unmask_probability(schedule, times[:-1], times[1:])
    chance[-1] = 1.0
    torch.testing.assert_close(unmasked_by(schedule, steps), 1 - (1 - chance).cumprod(0))
