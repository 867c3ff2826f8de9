"""Outcomes by the step that they belong to (their table: test_page.py)."""

import pytest

from llada.data.outcomes import KEPT, Report
from llada.data.report.funnel import (
    Amount,
    amount_read,
    by_outcome,
    in_order,
    refused_by_step,
    step_name,
    step_of,
)

REPORT = Report(
    outcomes={
        "en": {KEPT: [5, 50], "c4_quality.few_sentences": [1, 10], "too_short": [2, 4]},
        "de": {KEPT: [1, 9], "c4_quality.lorem_ipsum": [1, 20]},
    }
)


@pytest.mark.parametrize(
    ("outcome", "step", "name"),
    [
        ("too_long", "length", "Length limits"),
        ("c4_quality.lorem_ipsum", "c4", "C4"),
        ("language.low_score", "language", "Language"),
        ("contaminated", "contaminated", "Decontamination"),
        ("duplicate", "duplicate", "Duplicates"),
        ("example_longer_than_row", "example_longer_than_row", "Longer than a row"),
        ("unknown.rule", "unknown", "unknown"),
    ],
)
def test_each_rule_belongs_to_a_step(outcome, step, name):
    assert step_of(outcome) == step
    assert step_name(step) == name


def test_steps_come_in_their_order_and_unknown_ones_last():
    mixed = ["unknown", "duplicate", "contaminated", "c4", "length", "url"]
    assert in_order(mixed) == ["length", "url", "c4", "contaminated", "duplicate", "unknown"]


def test_amounts_are_summed_over_languages():
    assert by_outcome(REPORT)[KEPT] == Amount(6, 59)
    assert refused_by_step(REPORT) == {"c4": Amount(2, 30), "length": Amount(2, 4)}
    assert amount_read(REPORT) == Amount(10, 93)
