"""Countdown by seed: reach a target from a few numbers, each used once, by + − × ÷ (arXiv 2404.03683; as a planning task of
masked diffusion, arXiv 2410.14157).

A solution is a text of steps, "12*5=60,60-7=53": each takes two of the numbers that are there and puts its result in their
place, until the target alone is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from llada.settings import require

LARGEST = 99
"""Of the numbers to begin with."""
MOST = 999
"""Of any result."""

# What a sign does with two numbers; None where the result would be no whole number from 1 to MOST, or change nothing.
_OPERATIONS: dict[str, Callable[[int, int], int | None]] = {
    "+": lambda a, b: a + b if a + b <= MOST else None,
    "-": lambda a, b: a - b if a > b else None,
    "*": lambda a, b: a * b if a * b <= MOST and min(a, b) > 1 else None,
    "/": lambda a, b: a // b if a % b == 0 and b > 1 else None,
}


class Countdown(NamedTuple):
    """A problem with one of its solutions."""

    numbers: tuple[int, ...]
    target: int
    solution: str


def draw_countdown(random: Random, count: int = 3, largest: int = LARGEST) -> Countdown:
    """A problem of so many numbers from 1 to `largest`. Raises UserError for fewer than two, and for larger ones than LARGEST."""
    require(count >= 2, f"countdown: of {count} numbers there is nothing to be made: at least 2")
    require(0 < largest <= LARGEST, f"countdown: numbers go from 1 to at most {LARGEST}, not to {largest}")
    numbers = tuple(random.randint(1, largest) for _ in range(count))
    pool, steps = list(numbers), []
    while len(pool) > 1:
        a, b = sorted((pool.pop(random.randrange(len(pool))) for _ in range(2)), reverse=True)
        results = {sign: operation(a, b) for sign, operation in _OPERATIONS.items()}
        # Two equal numbers of more than half of MOST have their quotient, so there is always one.
        sign, result = random.choice([(sign, value) for sign, value in results.items() if value is not None])
        steps.append(f"{a}{sign}{b}={result}")
        pool.append(result)
    return Countdown(numbers, pool[0], ",".join(steps))


def is_solution(numbers: Sequence[int], target: int, text: str) -> bool:
    """Whether these steps lead from the numbers, all of them, to the target."""
    pool = list(numbers)
    for step in text.split(","):
        parts = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step)
        if parts is None:
            return False
        a, sign, b, result = int(parts[1]), parts[2], int(parts[3]), int(parts[4])
        for number in (a, b):
            if number not in pool:
                return False
            pool.remove(number)
        if _OPERATIONS[sign](a, b) != result:
            return False
        pool.append(result)
    return pool == [target]
