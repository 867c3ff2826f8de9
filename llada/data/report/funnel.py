"""Which step of a preparation refused how much: the outcomes of a report, summed over languages and by step."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

from llada.data.filters.chain import FILTERS
from llada.data.outcomes import KEPT, Report

DUPLICATE = "duplicate"
# What can end a document, in order. "pii" is not among them: it rewrites.
STEPS = {
    "length": "Length limits",
    "url": "URL lists",
    "language": "Language",
    "gopher_repetition": "Gopher repetition",
    "gopher_quality": "Gopher quality",
    "c4": "C4",
    "fineweb": "FineWeb",
    "classifier": "Classifier",
    "contaminated": "Decontamination",
    DUPLICATE: "Duplicates",
    "duplicate_of_earlier_snapshot": "Duplicates of earlier snapshots",
    "duplicate_lines": "Duplicate lines",
    "example_longer_than_row": "Longer than a row",
}
DUPLICATES = (DUPLICATE, "duplicate_of_earlier_snapshot", "duplicate_lines")


class Amount(NamedTuple):
    """Documents, and the bytes of their text."""

    documents: int = 0
    bytes: int = 0

    def plus(self, documents: int, size: int) -> Amount:
        return Amount(self.documents + documents, self.bytes + size)


NOTHING = Amount()


def step_of(outcome: str) -> str:
    """The step that ends a document with this outcome: "c4" of "c4_quality.lorem_ipsum"."""
    name = outcome.split(".")[0]
    if name in ("too_short", "too_long"):
        return "length"
    short = name.removesuffix("_quality")
    return short if name not in FILTERS and short in FILTERS else name


def step_name(step: str) -> str:
    """What a reader calls it."""
    return STEPS.get(step, step)


def rank(outcome: str) -> int:
    """Where in the order of the steps an outcome comes; unknown ones last."""
    step = step_of(outcome)
    return list(STEPS).index(step) if step in STEPS else len(STEPS)


def in_order(steps: Iterable[str]) -> list[str]:
    """Steps in the order in which they happen."""
    return sorted(steps, key=lambda step: (rank(step), step))


def by_outcome(report: Report) -> dict[str, Amount]:
    """{outcome: how much}, "kept" among them."""
    found: dict[str, Amount] = {}
    for counts_of in report.outcomes.values():
        for outcome, counts in counts_of.items():
            found[outcome] = found.get(outcome, NOTHING).plus(*counts)
    return found


def refused_by_step(report: Report) -> dict[str, Amount]:
    """{step: how much it refused}, in no order."""
    found: dict[str, Amount] = {}
    for outcome, amount in by_outcome(report).items():
        if outcome != KEPT:
            found[step_of(outcome)] = found.get(step_of(outcome), NOTHING).plus(*amount)
    return found


def amount_of(report: Report, outcome: str) -> Amount:
    """How much ended with one outcome."""
    return by_outcome(report).get(outcome, NOTHING)


def amount_read(report: Report) -> Amount:
    """How much was read, whatever became of it."""
    return functools.reduce(lambda total, amount: total.plus(*amount), by_outcome(report).values(), NOTHING)
