"""GLUE's measures: on a table computed by hand, and their errors beside the binomial's."""

from __future__ import annotations

import numpy as np
import pytest

from llada.understanding import scores
from llada.understanding.scores import score_answers


@pytest.fixture
def no_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two resamples, which are quick."""
    monkeypatch.setattr(scores, "RESAMPLES", 2)


@pytest.mark.usefixtures("no_errors")
def test_measures_of_a_table() -> None:
    # True positives 3, false positives 1, false negatives 2, true negatives 4.
    labels = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    answers = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    figures = score_answers(labels, [answers], "class", 2)
    assert figures["accuracy"] == 0.7
    assert figures["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert figures["mcc"] == pytest.approx((3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5)
    assert "accuracy_seed_stderr" not in figures
    swapped = [1 - label for label in labels], [[1 - answer for answer in answers]]
    assert score_answers(*swapped, "class", 2)["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))


def test_errors_by_rows_and_by_seeds() -> None:
    draw = np.random.default_rng(3)
    labels = draw.integers(2, size=400)
    answers = [np.where(draw.random(400) < share, labels, 1 - labels) for share in (0.8, 0.8, 0.6)]
    shares = [float((row == labels).mean()) for row in answers]
    figures = score_answers(labels.tolist(), [row.tolist() for row in answers[:1]], "class", 2)
    assert figures["accuracy_stderr"] == pytest.approx((shares[0] * (1 - shares[0]) / 400) ** 0.5, rel=0.15)
    all_three = score_answers(labels.tolist(), [row.tolist() for row in answers], "class", 2)
    assert all_three["accuracy"] == pytest.approx(np.mean(shares))
    assert all_three["accuracy_seed_stderr"] == pytest.approx(np.std(shares, ddof=1) / 3**0.5)
    assert all_three["accuracy_stderr"] < figures["accuracy_stderr"]


@pytest.mark.usefixtures("no_errors")
def test_scores_are_correlated_and_more_classes_averaged() -> None:
    figures = score_answers([1.0, 2.0, 3.0, 4.0], [[1.0, 4.0, 9.0, 16.0]], "score", 0)
    assert figures["spearman"] == pytest.approx(1)
    assert 0.9 < figures["pearson"] < 1
    assert set(figures) == {"pearson", "pearson_stderr", "spearman", "spearman_stderr"}
    three = score_answers([0, 1, 2, 2], [[0, 1, 2, 1]], "class", 3)
    assert three["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


@pytest.mark.usefixtures("no_errors")
def test_answers_that_are_all_one_correlate_with_nothing() -> None:
    assert score_answers([1.0, 2.0, 3.0], [[5.0, 5.0, 5.0]], "score", 0)["pearson"] == 0
    assert score_answers([0, 1, 1], [[1, 1, 1]], "class", 2)["mcc"] == 0


@pytest.mark.usefixtures("no_errors")
def test_one_row_has_no_error() -> None:
    assert set(score_answers([1], [[1], [1]], "class", 2)) & {"accuracy", "accuracy_stderr"} == {"accuracy"}
