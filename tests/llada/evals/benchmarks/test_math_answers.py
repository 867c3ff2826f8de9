"""Answers of MATH by Minerva's rules: as lm_eval's own functions have them, whose module wants another version of a package."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from llada.evals.benchmarks.math_answers import (
    NO_ANSWER,
    boxed_answer,
    final_answer,
    is_equivalent,
    normalize,
)

SHARED = Path(os.environ.get("LLADA_SHARED", Path(__file__).resolve().parents[5] / "shared"))
MATH = SHARED / "data/eval/math.jsonl"
TRICKY = [
    r"x = \frac12", r"\frac{1}{2}", r"\sqrt2", r"\sqrt[3]8", r"\sqrt[3]{8}x", "100,000", "0,1", "-1,234,567", "12,34",
    r"5\text{ cm}", "5 cm", "2\\pi cm", r"\left(3, \frac{\pi}{2}\right)", r"$\$18.90$", "$5$ dollars", "10 square feet",
    r"\text{Monday}", r"\textbf{(B)}", r"\overline{AB}", r"\boxed{7}", r"90^\circ", r"90^{\circ}", r"6\%", "3,\\text{and}4",
    r"11\mathrm{th}", "y=2x+3", "", r"\frac{a}{b}", r"\dfrac12", "a point", "an apple", "4 units", "1{,}000", r"[2,5)",
    r"\begin{pmatrix}1\\2\end{pmatrix}", "2\\text{\ns}", r"\ldots", "12 inches", "shift", r"\text{}^2", "1 000",
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """Functions and tables of lm_eval's minerva_math, without what its module imports."""
    source = Path(lm_eval.tasks.__file__).parent / "minerva_math" / "utils.py"
    wanted = ("SUBSTITUTIONS", "REMOVED_EXPRESSIONS", "normalize_final_answer", "get_unnormalized_answer")
    wanted += ("last_boxed_only_string", "remove_boxed")
    nodes = [
        node
        for node in ast.parse(source.read_text()).body
        if getattr(node, "name", None) in wanted
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in wanted)
    ]
    names: dict[str, Any] = {"re": re, "__annotations__": {}}
    code = "from __future__ import annotations\n" + "\n".join(map(ast.unparse, nodes))
    exec(compile(code, str(source), "exec"), names)
    return names


def check_normalized(answer: str, normalize_theirs: Callable[[str], str]) -> None:
    assert normalize(answer) == normalize_theirs(answer), answer


def test_answers_are_normalized_as_by_lm_eval(theirs: dict[str, Any]) -> None:
    for answer in TRICKY:
        check_normalized(answer, theirs["normalize_final_answer"])
    assert normalize("100,000") == "100000"
    assert normalize("0,1") == "0,1"
    assert normalize(r"x = \frac12 cm") == r"\frac{1}{2}"


def test_every_solution_of_the_benchmark_is_read_as_by_lm_eval(theirs: dict[str, Any]) -> None:
    if not MATH.is_file():
        pytest.skip(f"no {MATH}: set LLADA_SHARED")
    for line in MATH.read_text().splitlines():
        solution = json.loads(line)["solution"]
        boxed = theirs["remove_boxed"](theirs["last_boxed_only_string"](solution))
        assert boxed_answer(solution) == boxed
        check_normalized(boxed, theirs["normalize_final_answer"])


@pytest.mark.parametrize(
    "text",
    [
        "So. Final Answer: The final answer is $4$. I hope it is correct.",
        "Final Answer: The final answer is $4$",
        "Final Answer: The final answer is $4$. I hope it is correct.\n\nProblem: Final Answer: The final answer is 5. I hope it is correct.",
        "the answer is 4",
        "Final Answer: The final answer is\n4. I hope it is correct.",
        "",
    ],
)
def test_the_final_answer_is_found_as_by_lm_eval(text: str, theirs: dict[str, Any]) -> None:
    assert final_answer(text) == theirs["get_unnormalized_answer"](text)


def test_the_last_box_counts_with_the_braces_in_it() -> None:
    assert boxed_answer(r"first \boxed{1}, then \boxed{\frac{1}{2}} follows") == r"\frac{1}{2}"
    assert boxed_answer(r"$\boxed 7$ is it") == "7"
    assert boxed_answer(r"\fbox{3}") == "3"
    assert [boxed_answer(text) for text in ("none", r"\boxed{open", r"\boxed", r"\boxed}")] == [NO_ANSWER] * 4


def test_the_same_answer_may_be_spelled_differently() -> None:
    assert is_equivalent(r"\frac{1}{2}", "0.5")
    assert is_equivalent("(x+1)^2", "x^2+2x+1")
    assert is_equivalent("[2,5)", "[2,5)")
    assert not is_equivalent("(1,2)", "(2,1)")
    assert not is_equivalent(r"\frac{1}{2}", "2")
    assert not is_equivalent("", "")
    assert not is_equivalent(NO_ANSWER, "0")
