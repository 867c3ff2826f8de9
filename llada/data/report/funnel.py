"""Which step of a preparation refused how much: the outcomes of a report, summed over languages and by step."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

from llada.data.dedup.decontaminate import Decontamination
from llada.data.filters.chain import FILTERS, running_order
from llada.data.filters.filter import Filter
from llada.data.filters.length import LengthLimits
from llada.data.outcomes import KEPT, Report
from llada.data.tokens.chat import NO_WORDS, REFUSED, TOO_LONG

DUPLICATE = "duplicate"
DUPLICATES = (DUPLICATE, "duplicate_of_earlier_snapshot", "duplicate_lines")


def _filters() -> dict[str, type[Filter]]:
    """What refuses single documents, in order."""
    named = {name: FILTERS[name] for name in running_order()}
    return {"length": LengthLimits, **named, "contaminated": Decontamination}


@functools.cache
def steps() -> dict[str, str]:
    """{step: what a reader calls it} of all that can end a document, in order. What only rewrites is not among them."""
    return {
        **{name: each.label for name, each in _filters().items() if each.reasons},
        DUPLICATE: "Duplicates",
        "duplicate_of_earlier_snapshot": "Duplicates of earlier snapshots",
        "duplicate_lines": "Too short without duplicate lines",
        NO_WORDS: "Not in the tokenizer's vocabulary",
        REFUSED: "Refused by the chat template",
        TOO_LONG: "Longer than a row",
    }


@functools.cache
def _step_of_rules() -> dict[str, str]:
    """{the beginning of a rule's name: the step it belongs to}"""
    return {rule.split(".")[0]: name for name, each in _filters().items() for rule in each.reasons}


class Amount(NamedTuple):
    """Documents, and the bytes of their text."""

    documents: int = 0
    bytes: int = 0

    def plus(self, documents: int, size: int) -> Amount:
        return Amount(self.documents + documents, self.bytes + size)


NOTHING = Amount()


def step_of(outcome: str) -> str:
    """The step that ends a document with this outcome: "c4" of "c4_quality.lorem_ipsum". What stands behind a colon is
    the words of somebody else."""
    name = outcome.split(":")[0].split(".")[0]
    return _step_of_rules().get(name, name)


def step_name(step: str) -> str:
    """What a reader calls it."""
    return steps().get(step, step)


def rank(outcome: str) -> int:
    """Where in the order of the steps an outcome comes; unknown ones last."""
    step = step_of(outcome)
    return list(steps()).index(step) if step in steps() else len(steps())


def in_order(steps: Iterable[str]) -> list[str]:
    """Steps in the order in which they happen."""
    return sorted(steps, key=lambda step: (rank(step), step))


def by_outcome(report: Report) -> dict[str, Amount]:
    """{outcome: how much}, "kept" among them."""
    amounts: dict[str, Amount] = {}
    for counts_of in report.outcomes.values():
        for outcome, counts in counts_of.items():
            amounts[outcome] = amounts.get(outcome, NOTHING).plus(*counts)
    return amounts


def refused_by_step(report: Report) -> dict[str, Amount]:
    """{step: how much it refused}, in no order."""
    amounts: dict[str, Amount] = {}
    for outcome, amount in by_outcome(report).items():
        if outcome != KEPT:
            amounts[step_of(outcome)] = amounts.get(step_of(outcome), NOTHING).plus(*amount)
    return amounts


def amount_of(report: Report, outcome: str) -> Amount:
    """How much ended with one outcome."""
    return by_outcome(report).get(outcome, NOTHING)


def amount_read(report: Report) -> Amount:
    """How much was read, whatever became of it."""
    return functools.reduce(lambda total, amount: total.plus(*amount), by_outcome(report).values(), NOTHING)
