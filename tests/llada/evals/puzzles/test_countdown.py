"""Problems against Python's own arithmetic, and solutions that are wrong in one place."""

from __future__ import annotations

import re
from random import Random

import pytest

from llada.errors import UserError
from llada.evals.puzzles.countdown import LARGEST, MOST, draw_countdown, is_solution


@pytest.mark.parametrize("count", [2, 3, 5])
def test_drawn_problems_have_their_solution(count: int):
    signs = ""
    for seed in range(300):
        problem = draw_countdown(Random(seed), count)
        assert problem == draw_countdown(Random(seed), count)
        assert len(problem.numbers) == count
        assert all(1 <= number <= LARGEST for number in problem.numbers)
        steps = problem.solution.split(",")
        assert len(steps) == count - 1
        for step in steps:
            left, result = step.split("=")
            assert eval(left) == int(result)
            assert 1 <= int(result) <= MOST
        assert is_solution(problem.numbers, problem.target, problem.solution)
        signs += "".join(re.findall(r"[-+*/]", problem.solution))
    assert set(signs) == set("+-*/")
    assert len({draw_countdown(Random(seed), count) for seed in range(300)}) > 290


@pytest.mark.parametrize(
    "text, is_right",
    [
        ("12*5=60,60-7=53", True),
        ("5*12=60,60-7=53", True),
        ("12*5=60,60-7=54", False),  # wrong arithmetic
        ("12*5=60,7-60=53", False),
        ("12*5=61,61-8=53", False),
        ("60-7=53", False),  # of a number that is not there
        ("12*5=60", False),  # not all used
        ("12*5=60,60-7=53,53", False),
        ("12*5=60,12*5=60,60-7=53", False),  # a number used twice
        ("12*5=60, 60-7=53", False),
        ("12*5=60,60-7=53.0", False),
        ("", False),
    ],
)
def test_what_is_a_solution(text: str, is_right: bool):
    assert is_solution((7, 12, 5), 53, text) is is_right


def test_a_division_has_no_rest_and_a_number_given_twice_may_be_used_twice():
    assert is_solution((8, 4, 2), 4, "8/4=2,2+2=4")
    assert not is_solution((9, 4, 2), 4, "9/4=2,2+2=4")
    assert is_solution((6, 6), 36, "6*6=36")
    assert not is_solution((6, 6), 36, "6*6=36,6*6=36")


def test_numbers_may_be_small():
    drawn = [draw_countdown(Random(seed), 3, 4) for seed in range(100)]
    assert {number for problem in drawn for number in problem.numbers} == {1, 2, 3, 4}
    for largest in (0, LARGEST + 1):
        with pytest.raises(UserError, match=f"at most {LARGEST}, not to {largest}"):
            draw_countdown(Random(0), 3, largest)


def test_one_number_is_no_problem():
    with pytest.raises(UserError, match="of 1 numbers there is nothing"):
        draw_countdown(Random(0), 1)
