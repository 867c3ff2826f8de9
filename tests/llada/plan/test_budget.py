"""Quokka's law at the points that are known of it."""

from __future__ import annotations

import pytest

from llada.errors import UserError
from llada.plan.budget import ABLATED_BATCH, most_epochs, plan_budget


@pytest.mark.parametrize(
    ("flops", "parameters", "tokens", "loss"),
    [(1e19, 126e6, 13.2e9, 3.78), (9.5e19, 400e6, 39.3e9, 3.31), (1e21, 1.34e9, 124e9, 2.99)],
)
def test_the_laws_table(flops: float, parameters: float, tokens: float, loss: float) -> None:
    plan = plan_budget(flops)
    assert plan.parameters == pytest.approx(parameters, rel=0.01)
    assert plan.tokens == pytest.approx(tokens, rel=0.01)
    assert plan.loss == pytest.approx(loss, abs=0.01)
    assert 6 * plan.parameters * plan.tokens == pytest.approx(flops, rel=0.01)
    assert (plan.epochs, plan.limited_by, plan.is_extrapolated) == (1.0, "compute", False)


def test_llada_8b_is_half_as_large_and_twice_as_long_trained_as_the_law_says() -> None:
    """So the paper's first figure says of it."""
    plan = plan_budget(6 * 8.02e9 * 2.3e12, extrapolate=True)
    assert plan.parameters / 8.02e9 == pytest.approx(2, rel=0.15)
    assert 2.3e12 / plan.tokens == pytest.approx(2, rel=0.15)
    assert plan.is_extrapolated


@pytest.mark.parametrize(("unique", "epochs"), [(1e7, 70), (1e8, 175), (1e9, 430), (1e10, 1057)])
def test_epochs_of_the_papers_examples(unique: float, epochs: float) -> None:
    assert most_epochs(400e6, unique) == pytest.approx(epochs, rel=0.02)


def test_a_10b_model_on_a_trillion_tokens() -> None:
    assert most_epochs(10e9, 1e12) == pytest.approx(1100, rel=0.02)


def test_text_is_repeated_as_often_as_it_may_be() -> None:
    plenty, some = (plan_budget(1e20, unique) for unique in (1e11, 1e10))
    assert plenty.epochs < 1
    assert plenty.loss is not None
    assert some.epochs == pytest.approx(some.tokens / 1e10)
    assert some.parameters == plenty.parameters
    assert some.loss is None
    assert some.used_flops == pytest.approx(1e20, rel=0.01)


@pytest.mark.parametrize(
    ("unique", "parameters", "epochs"),
    [(1e7, 41e6, 247), (1e8, 95e6, 356), (1e9, 222e6, 569), (1e10, 518e6, 910)],
)
def test_too_little_text_leaves_compute_unused(unique: float, parameters: float, epochs: float) -> None:
    """The paper's joint allocation, whatever the budget."""
    plan = plan_budget(1e24, unique, extrapolate=True)
    assert plan.limited_by == "text"
    assert plan.parameters == pytest.approx(parameters, rel=0.02)
    assert plan.epochs == plan.most_epochs == pytest.approx(epochs, rel=0.09)
    assert plan.used_flops == pytest.approx(6 * plan.parameters * plan.tokens)
    assert plan.used_flops < 1e24


def test_batch_and_rate() -> None:
    """The law's batch at the ablation's budget lies where the ablation found no difference."""
    plan = plan_budget(6 * 1e9 * 96e9)
    assert ABLATED_BATCH[0] < plan.batch_tokens < ABLATED_BATCH[1]
    assert plan.learning_rate[0] < plan.learning_rate[1] < 1e-3


def test_outside_of_the_fit() -> None:
    for flops in (1e18, 1e23):
        with pytest.raises(UserError, match=r"outside 1e\+19 to 1e\+21.*--extrapolate"):
            plan_budget(flops)
    with pytest.raises(UserError, match=r"1e\+06 unique tokens are outside 1e\+07 to 1e\+12"):
        plan_budget(1e20, 1e6)
    assert plan_budget(1e20, 1e6, extrapolate=True).is_extrapolated
    assert not plan_budget(1e20, 1e13).is_extrapolated  # nothing is repeated
