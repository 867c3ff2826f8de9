"""Programs made of answers, by the rules of each benchmark, and what came of them."""

from __future__ import annotations

import sys

import pytest

from llada.evals.benchmarks.code_tasks import (
    complete_function,
    complete_function_in_block,
    fill_gap,
    first_block,
    sandboxed,
    whole_program,
)

ADD = {
    "prompt": "def add(a, b):\n",
    "suffix": "    return c\n",
    "test": "def check(f):\n    assert f(1, 2) == 3\n",
    "entry_point": "add",
}
MBPP = {"test_list": [f"assert add(1, {n}) == {n + 1}" for n in range(3)], "test_setup_code": "one = 1"}


def test_answers_stand_where_the_benchmark_has_them() -> None:
    check = "\ndef check(f):\n    assert f(1, 2) == 3\n\ncheck(add)"
    assert complete_function(ADD, "    return a + b") == f"def add(a, b):\n    return a + b{check}"
    assert complete_function_in_block(ADD, "    return a + b\n```\nThat is it: ```") == complete_function(
        ADD, "    return a + b\n"
    )
    assert fill_gap(ADD, "    c = a + b\n") == f"def add(a, b):\n    c = a + b\n    return c\n{check}"
    asserts = "\n".join(MBPP["test_list"])
    assert whole_program(MBPP, "code") == f"code\none = 1\n{asserts}"
    assert whole_program({"test_list": ["a", "b", "c", "d"]}, "code") == "code\n\na\nb\nc"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("def f():\n    pass\n```", "def f():\n    pass"),
        ("python\ndef f(): pass\n```\nAnd: ```python\nx\n```", "def f(): pass"),
        ("\nx = 1\n```", "x = 1"),
        ("x = 1```", "x = 1"),
        ("x = 1", ""),  # never closed
        ("```", ""),
    ],
)
def test_the_first_block_of_a_chat_is_the_program(answer: str, code: str) -> None:
    assert first_block(MBPP, answer) == whole_program(MBPP, code)


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's seccomp")
def test_an_answer_becomes_what_came_of_its_program() -> None:
    changes = sandboxed(complete_function)
    (rule,) = changes["filter_list"][0]["filter"]
    answers = [["    return a + b", "    return a - b"], ["    raise SystemExit(0)"]]
    found = rule["filter_fn"](answers, [ADD, ADD])
    assert found == [["passed", "AssertionError"], ["SystemExit"]]
    assert [changes["process_results"](ADD, [outcomes]) for outcomes in found] == [
        {"pass@1": 0.5},
        {"pass@1": 0.0},
    ]
    assert changes["unsafe_code"] is False
