"""Ours beside what is published: cells, notes, columns, the figure."""

from __future__ import annotations

import statistics
from typing import Any
from xml.etree import ElementTree

import pytest

from llada.evals.benchmarks.published import find_settings
from llada.evals.benchmarks.table import (
    HEADER,
    Summary,
    draw,
    mean_with_error,
    notes,
    table_rows,
    to_markdown,
    to_terminal,
)


def summary(**changes: Any) -> Summary:
    whole: dict[str, Any] = {
        "name": "gsm8k", "title": "GSM8K", "metric": "exact_match", "filter": "flexible-extract", "tasks": ["gsm8k"], "place": "",
        "is_mean_of_tasks": False, "is_share": True, "value": 0.683, "stderr": 0.0128, "items": 1319,
        "results": {"paper": 70.3, "paper-v1": 70.7}, "settings": {"num_fewshot": 4, "sampling": {"block_length": 8}},
        "settings_hash": "0a1b2c3d", "given": [], "requests": 1319, "requests_cut": 0, "nfe": 256.0, "remark": "",
    }  # fmt: skip
    return {**whole, **changes}  # type: ignore[typeddict-item]


def test_a_row_has_ours_with_its_spread_beside_the_published_figures() -> None:
    header, row = table_rows([summary()])
    assert header == HEADER
    assert row == (
        "GSM8K", "exact_match", "4", "1,319", "68.3 ± 1.3", "70.3 (paper), 70.7 (paper-v1)", "-2.0 (1.6 s.e.)", "0a1b2c3d"
    )  # fmt: skip
    (_, alone) = table_rows([summary(stderr=None, results={}, given=["gen_length"], requests_cut=3)])
    assert alone[4:] == ("68.3", "–", "", "0a1b2c3d*†")
    (_, bits) = table_rows([summary(is_share=False, value=1.23456, stderr=0.0123, results={})])
    assert bits[4] == "1.235 ± 0.012 (no %)"


def test_notes_tell_what_the_marks_mean() -> None:
    assert notes([summary()]) == []
    cut, given = (
        notes([summary(requests_cut=1200)]),
        notes([summary(given=["gen_length", "score.cfg_scale"])]),
    )
    assert cut[0].startswith("† GSM8K: 1,200 of 1,319 requests did not fit the context")
    assert given == ["* GSM8K: not as published: gen_length, score.cfg_scale"]


def test_markdown_has_the_table_the_sources_and_the_settings() -> None:
    text = to_markdown([summary(), summary(title="A|B")], {"paper": "the paper", "other": "unused"}, "Ours")
    lines = text.splitlines()
    assert lines[0] == "# Ours"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert {line.replace(r"\|", "").count("|") for line in table} == {len(HEADER) + 1}
    assert "- paper: the paper" in lines
    assert "unused" not in text
    assert "- `0a1b2c3d` GSM8K: num_fewshot=4, sampling.block_length=8" in lines


def test_columns_stand_below_each_other_also_in_chinese() -> None:
    text = to_terminal([("名字", "n"), ("a", "1"), ("诗词诗", "22")]).splitlines()
    assert text == ["名字    n", "──────────", "a       1", "诗词诗  22"]


def test_the_figure_is_an_svg_that_is_the_same_for_the_same_figures() -> None:
    rows = [summary(), summary(title="MMLU", stderr=None, results={})]
    first = draw(rows)
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert draw(rows) == first
    assert draw([summary(value=0.5)]) != draw([summary()])


def test_the_error_is_that_of_the_mean() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    mean, error = mean_with_error(values)
    assert mean == pytest.approx(0.6)
    assert error == pytest.approx(statistics.stdev(values) / 5**0.5)
    assert mean_with_error([1.0]) == (1.0, None)


def test_published_settings_say_where_they_are_from_and_what_others_came_to() -> None:
    settings = find_settings("llada_base")
    text = to_markdown([summary(name="mmlu", title="MMLU")], {}, "Ours", settings)
    assert f"- settings of LLaDA 8B Base: {settings.of}" in text
    assert "- LLaMA3 8B Base, as the paper has it: MMLU 65.4\n" in text
