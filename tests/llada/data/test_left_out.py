"""llada/data/left_out.py: files that are not read, counted and named."""

from __future__ import annotations

import json

from llada.data.left_out import added, leave_out, summary


def test_counts_and_names():
    left_out = {}
    assert summary(left_out) == "none"
    for number in range(5):
        leave_out(left_out, "*.md", f"{number}.md")
    leave_out(left_out, "hidden", ".x")
    assert left_out == {
        "*.md": {"files": 5, "examples": ["0.md", "1.md", "2.md"]},
        "hidden": {"files": 1, "examples": [".x"]},
    }
    assert summary(left_out) == "*.md 5 (0.md, 1.md, 2.md, ...), hidden 1 (.x)"


def test_sums():
    one, other = {}, {}
    leave_out(one, "hidden", "a", "b")
    leave_out(other, "hidden", "c", "d", files=7)
    leave_out(other, "empty", "e")
    assert added(one, other) == {
        "hidden": {"files": 8, "examples": ["a", "b", "c"]},
        "empty": {"files": 1, "examples": ["e"]},
    }
    assert one == {"hidden": {"files": 1, "examples": ["a", "b"]}}
    assert added({}, one) == added(one, {}) == one


def test_a_suffix_for_each_file_fills_no_memory():
    left_out = {}
    for number in range(1000):
        leave_out(left_out, f"*.{number}", f"x.{number}")
    assert len(left_out) == 101
    assert left_out["other"]["files"] == 900


def test_any_name_can_be_written_and_shown_in_a_line():
    left_out = {}
    leave_out(left_out, "hidden", "\udcff", "a\nb")
    assert json.loads(json.dumps(left_out).encode()) == left_out
    assert summary(left_out) == "hidden 1 (\\udcff, a\\nb)"
