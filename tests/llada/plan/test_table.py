"""The table of a plan."""

from __future__ import annotations

from llada.plan.limits import Demand
from llada.plan.table import format_table, limit_rows


def test_columns_are_aligned_in_each_section() -> None:
    assert format_table({"A": [("x", "1"), ("long", "2")], "B": [("y", "3")]}) == (
        "A\n  x     1\n  long  2\n\nB\n  y  3"
    )


def test_what_breaks_is_told_with_its_remedy_and_what_does_not_without() -> None:
    demands = [
        Demand("prepare", "blocks", 8192, "cores", 4096, "fewer nodes"),
        Demand("prepare", "memory", 2e9, "bytes", 4e9, "more memory"),
        Demand("pretrain", "wait", 90, "s", 3600, "wait"),
        Demand("pretrain", "rate", 12_000, "bytes a second"),
    ]
    assert dict(limit_rows(demands)) == {
        "prepare: blocks": "8,192 cores of 4,096 cores (200%) — fewer nodes",
        "prepare: memory": "2.0 GB of 4.0 GB (50%)",
        "pretrain: wait": "1.5 min of 1.0 hours (2%)",
        "pretrain: rate": "12.0 kB a second",
        "prepare: first to break": "blocks",
        "pretrain: first to break": "nothing at this size",
    }
