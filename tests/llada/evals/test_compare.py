"""Two results against each other: intervals that are right, and a line for what does not match."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llada.errors import UserError
from llada.evals.compare import (
    CompareConfig,
    Comparison,
    Difference,
    bootstrap_interval,
    compare,
    comparison_rows,
)


def result(folder: Path, benchmarks: dict[str, dict[str, Any]]) -> str:
    """An output: {benchmark: {"items": {task: {content: figure}}, further keys of its summary}}."""
    (folder / "benchmarks").mkdir(parents=True)
    summaries = {}
    for name, given in benchmarks.items():
        given = dict(given)
        items = given.pop("items")
        for task, figures in items.items():
            rows = [
                {
                    "doc_id": n,
                    "doc_hash": content.rstrip("'"),
                    "filter": rule,
                    "acc": figure if rule == "none" else 0,
                }
                for n, (content, figure) in enumerate(figures.items())
                for rule in ("other", "none")
            ]
            (folder / "benchmarks" / f"{task}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
        summaries[name] = {
            "title": name.upper(), "metric": "acc", "filter": "none", "tasks": list(items), "is_mean_of_tasks": False, "is_share": True,
            "settings": {}, "settings_hash": "1", **given,
        }  # fmt: skip
        values = [list(figures.values()) for figures in items.values()]
        if not summaries[name]["is_mean_of_tasks"]:
            values = [[value for group in values for value in group]]
        summaries[name].setdefault("value", float(np.mean([np.mean(group) for group in values])))
    (folder / "results.json").write_text(json.dumps({"benchmarks": summaries}))
    return str(folder)


def test_only_common_items_are_compared_wherever_they_stand(tmp_path: Path) -> None:
    a = result(tmp_path / "a", {"t": {"items": {"t": {"x": 1, "y": 0, "z": 0, "x'": 1}}}})
    b = result(tmp_path / "b", {"t": {"items": {"t": {"z": 1, "x": 1, "w": 1}}}})
    found = compare(a, f"{b}/results.json", CompareConfig(resamples=100))
    (row,) = found.differences
    assert row[:6] == ("t", "T", 2, 0.5, 1.0, 0.5)
    assert found.remarks == [f"t: 2 items are only in {a}", f"t: 1 items are only in {b}"]


def test_what_does_not_match_is_a_line_each(tmp_path: Path) -> None:
    items = {"items": {"t": {"x": 1, "y": 0}}}
    settings = {"score": {"cfg_scale": 0.5}, "num_fewshot": 4}
    a = result(
        tmp_path / "a", {"t": {**items, "settings": settings, "settings_hash": "2"}, "only": {**items}}
    )
    other = {"score": {"cfg_scale": 0.0}, "num_fewshot": 4, "chat": True}
    b = result(
        tmp_path / "b",
        {"t": {**items, "settings": other, "settings_hash": "3"}, "more": {**items}},
    )
    assert compare(a, b).remarks == [
        f"only is only in {a}",
        f"more is only in {b}",
        "t: other settings (score.cfg_scale 0.5 / 0.0, chat – / True)",
    ]


def test_an_interval_is_that_of_the_binomial() -> None:
    """Of n differences of −1, 0 and 1 the mean is about normal with their own variance."""
    differences = np.array([1.0] * 130 + [-1.0] * 90 + [0.0] * 780)
    low, high = bootstrap_interval([differences], CompareConfig(resamples=40_000))
    error = differences.std() / math.sqrt(1000)
    assert (low, high) == pytest.approx((0.04 - 1.96 * error, 0.04 + 1.96 * error), abs=0.002)
    narrow = bootstrap_interval([differences], CompareConfig(resamples=40_000, confidence=0.5))
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * error, rel=0.05)
    # Drawn one by one it is the same.
    draws = np.random.default_rng(1).integers(0, 1000, (4000, 1000))
    assert np.percentile(differences[draws].mean(1), [2.5, 97.5]) == pytest.approx([low, high], abs=0.003)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    config = CompareConfig(resamples=400, confidence=0.9)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval([generator.choice([-1.0, 0.0, 1.0], 200, p=[0.2, 0.5, 0.3])], config)
        covered += low <= 0.1 <= high
    assert covered / 300 == pytest.approx(0.9, abs=0.05)


def test_pairing_and_equality_leave_no_doubt(tmp_path: Path) -> None:
    """The same answers differ by nothing, however wide the figures themselves are known."""
    items = {"items": {"t": {str(n): n % 2 for n in range(20)}}}
    a, b = result(tmp_path / "a", {"t": items}), result(tmp_path / "b", {"t": items})
    (row,) = compare(a, b).differences
    assert (row.difference, row.low, row.high) == (0, 0, 0)
    assert comparison_rows(compare(a, b), CompareConfig())[1] == (
        "T",
        "20",
        "50.0 %",
        "50.0 %",
        "+0.0",
        "[+0.0, +0.0]",
    )


def test_a_figure_that_is_no_share_is_told_as_it_is(tmp_path: Path) -> None:
    a, b = (
        result(tmp_path / name, {"t": {"items": {"t": {"x": 45.2, "y": 30 + more}}, "is_share": False}})
        for name, more in (("a", 0), ("b", 1))
    )
    assert comparison_rows(compare(a, b), CompareConfig())[1][2:5] == ("37.6", "38.1", "+0.5")


def test_tasks_that_count_the_same_do_so_here(tmp_path: Path) -> None:
    def items(small: int) -> dict[str, Any]:
        large = {str(n): 0 for n in range(98)}
        return {"items": {"large": large, "small": {"x": small, "y": small}}, "is_mean_of_tasks": True}

    a, b = result(tmp_path / "a", {"t": items(0)}), result(tmp_path / "b", {"t": items(1)})
    (row,) = compare(a, b).differences
    assert (row.items, row.a, row.b) == (100, 0, 0.5)


@pytest.mark.parametrize(
    ("items", "value"),
    [
        ({"x": -5.0, "y": -4.0}, math.exp(4.5)),  # a perplexity's items are likelihoods
        ({"x": [-300.0, 80], "y": [-200.0, 70]}, 30.0),  # … and words
    ],
)
def test_what_is_no_mean_of_its_items_is_not_shown_as_another_figure(
    tmp_path: Path, items: dict[str, Any], value: float
) -> None:
    plain = {"items": {"u": {"x": 1, "y": 0}}}
    odd = {"items": {"t": items}, "value": value, "is_share": False}
    a, b = (result(tmp_path / name, {"t": odd, "u": plain}) for name in "ab")
    found = compare(a, b)
    assert [difference.name for difference in found.differences] == ["u"]
    assert found.remarks == [f"t: acc, {value:.4g} in {a}, is no mean of its items, not compared"]


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    a = result(tmp_path / "a", {"t": {"items": {"t": {"x": 1}}}})
    b = result(tmp_path / "b", {"t": {"items": {"t": {"y": 1}}}})
    with pytest.raises(
        UserError, match="have nothing to compare; t: 1 items are only in .*no item is in both"
    ):
        compare(a, b)
    with pytest.raises(
        UserError, match=r"is no finished output of llada evaluate: there is no .*none/results\.json"
    ):
        compare(a, str(tmp_path / "none"))
    (tmp_path / "b" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="holds no benchmarks"):
        compare(a, b)
    with pytest.raises(UserError, match="compare: confidence must be below 1"):
        CompareConfig(confidence=1.0)


def test_one_item_says_nothing_of_others(tmp_path: Path) -> None:
    a = result(tmp_path / "a", {"t": {"items": {"t": {"x": 1}}}})
    b = result(tmp_path / "b", {"t": {"items": {"t": {"x": 0}}}})
    found = compare(a, b)
    assert [difference.items for difference in found.differences] == [1]
    assert "t: one item is in both, which says nothing of others" in found.remarks
    assert comparison_rows(found, CompareConfig())[1][-1] == "n/a"


def test_nothing_is_shown_as_a_little_less_than_nothing() -> None:
    little = Difference("t", "T", 9, 0.5, 0.5, -1e-9, -1e-9, 1e-9, is_share=True)
    (_, row) = comparison_rows(Comparison([little], []), CompareConfig())
    assert row[-2:] == ("+0.0", "[+0.0, +0.0]")


def test_a_task_of_one_item_leaves_a_mean_of_tasks_without_an_interval(tmp_path: Path) -> None:
    a, b = (
        result(
            tmp_path / name,
            {"t": {"items": {"one": {"x": 1}, "two": {"y": 0, "z": n}}, "is_mean_of_tasks": True}},
        )
        for n, name in enumerate("ab")
    )
    found = compare(a, b)
    assert found.differences[0].difference == 0.25
    assert math.isnan(found.differences[0].low)
    assert found.remarks == ["t: one item of 1 of its 2 tasks is in both, which says nothing of others"]


SUMMARY = {
    "title": "T", "metric": "acc", "filter": "none", "tasks": ["t"], "is_mean_of_tasks": False, "is_share": True, "value": 1.0, "settings": {}, "settings_hash": "1"
}  # fmt: skip


@pytest.mark.parametrize(
    ("results", "items", "message"),
    [
        ("[]", "", "results.json holds no benchmarks"),
        ("7", "", "results.json holds no benchmarks"),
        ('{"benchmarks": [1]}', "", "results.json holds no benchmarks"),
        ('{"benchmarks": {"t"', "", "results.json is no JSON"),
        ('{"benchmarks": {"t": 1}}', "", "results.json, benchmark t is no JSON object"),
        (
            json.dumps({"benchmarks": {"t": {**SUMMARY, "tasks": "t"}}}),
            "",
            "results.json, benchmark t: the field 'tasks' must be list, not 't'",
        ),
        (
            json.dumps({"benchmarks": {"t": {k: v for k, v in SUMMARY.items() if k != "metric"}}}),
            "",
            "results.json, benchmark t has no field 'metric'",
        ),
        (
            json.dumps({"benchmarks": {"t": SUMMARY}}),
            '{"doc_hash": "x", "filter": "none", "acc": 1}\n{"doc_ha',
            "t.jsonl, line 2 is no JSON",
        ),
        (json.dumps({"benchmarks": {"t": SUMMARY}}), '{"filter": "none"}', "row 1 has no field 'doc_hash'"),
        (json.dumps({"benchmarks": {"t": SUMMARY}}), '{"doc_hash": "x"}', "row 1 has no field 'filter'"),
        (
            json.dumps({"benchmarks": {"t": SUMMARY}}),
            '{"doc_hash": "x", "filter": "none", "acc": NaN}',
            "t.jsonl, row 1: acc is nan, which has no mean",
        ),
        (
            json.dumps({"benchmarks": {"t": SUMMARY}}),
            '{"doc_hash": "x", "filter": "none", "acc": 1' + "0" * 400 + "}",
            "t.jsonl, row 1: acc is 1000*, which has no mean",
        ),
        (json.dumps({"benchmarks": {"t": SUMMARY}}), "", "t.jsonl holds no rows"),
        (json.dumps({"benchmarks": {"t": SUMMARY}}), None, "there is no file .*t.jsonl"),
    ],
    ids=str,
)
def test_damaged_results_are_one_line(tmp_path: Path, results: str, items: str | None, message: str) -> None:
    (tmp_path / "a" / "benchmarks").mkdir(parents=True)
    (tmp_path / "a" / "results.json").write_text(results)
    if items is not None:
        (tmp_path / "a" / "benchmarks" / "t.jsonl").write_text(items)
    with pytest.raises(UserError, match=message) as caught:
        compare(str(tmp_path / "a"), str(tmp_path / "a"))
    assert "\n" not in str(caught.value)
