"""The games of `planning.py`: their problems by seed, and what solves them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from llada.evals.puzzles.countdown import LARGEST, draw_countdown, is_solution
from llada.evals.puzzles.sudoku import Box, Sudoku, board_text, canonical_form, disguise, draw_sudoku


class Problem(NamedTuple):
    """A puzzle and its answer, of one length each in a game."""

    prompt: str
    answer: str
    level: int
    """How hard it is."""


@dataclass(frozen=True)
class SudokuGame:
    """Boards of a shape and their problems."""

    box: Box
    blanks: tuple[int, ...]
    """Empty cells, one as often as the other."""
    drawn: int
    """Puzzles of which the training's are forms."""

    signs = "\n.123456789"
    level_name = "empty cells"

    @property
    def levels(self) -> tuple[int, ...]:
        return self.blanks

    def is_solved(self, problem: Problem, text: str) -> bool:
        return text == problem.answer

    def same(self, problem: Problem) -> str:
        """Equal of problems that are one: `disguise` makes others of it for the training, which a solver finds to be the same."""
        givens, solution = (
            tuple(0 if sign == "." else int(sign) for sign in text if sign != "\n")
            for text in (problem.prompt, problem.answer)
        )
        return board_text(canonical_form(Sudoku(givens, solution), self.box).givens, self.box)

    def asked(self, number: int, seed: str) -> list[Problem]:
        """Of each level so many."""
        random = Random(seed)
        return [self._draw(random, blanks) for blanks in self.blanks for _ in range(number)]

    def training(self, hidden: Container[str]) -> Iterator[Problem]:
        """Without end, none of them the `same` as one of the hidden."""
        random, forms = Random("to train on"), Random("forms")
        drawn: list[Sudoku] = []
        for blanks in itertools.islice(itertools.cycle(self.blanks), self.drawn):
            puzzle = draw_sudoku(random, self.box, blanks)
            while self.same(self._problem(puzzle)) in hidden:
                puzzle = draw_sudoku(random, self.box, blanks)
            drawn.append(puzzle)
        while True:
            for puzzle in drawn:
                yield self._problem(disguise(puzzle, self.box, forms))

    def _draw(self, random: Random, blanks: int) -> Problem:
        while True:
            puzzle = draw_sudoku(random, self.box, blanks)
            if puzzle.givens.count(0) == blanks:
                return self._problem(puzzle)

    def _problem(self, puzzle: Sudoku) -> Problem:
        prompt, answer = (board_text(board, self.box) for board in puzzle)
        return Problem(prompt, answer, puzzle.givens.count(0))


@dataclass(frozen=True)
class CountdownGame:
    """Problems of three numbers."""

    largest: int = LARGEST

    levels = (0, 1, 2)
    level_name = "multiplications and divisions"
    signs = " 0123456789+-*/=,:"

    def is_solved(self, problem: Problem, text: str) -> bool:
        numbers, target = problem.prompt.rstrip(":").split("=")
        return is_solution([int(number) for number in numbers.split(",")], int(target), text.rstrip(" "))

    def same(self, problem: Problem) -> str:
        """Equal of problems that are one: their numbers may stand in any order."""
        numbers, target = problem.prompt.split("=")
        return ",".join(sorted(numbers.split(","))) + target

    def asked(self, number: int, seed: str) -> list[Problem]:
        """Of each level so many."""
        random = Random(seed)
        found: dict[int, list[Problem]] = {level: [] for level in self.levels}
        while min(map(len, found.values())) < number:
            problem = self._draw(random)
            found[problem.level].append(problem)
        return [problem for problems in found.values() for problem in problems[:number]]

    def training(self, hidden: Container[str]) -> Iterator[Problem]:
        """Without end, none of them the `same` as one of the hidden."""
        random = Random("to train on")
        while True:
            problem = self._draw(random)
            if self.same(problem) not in hidden:
                yield problem

    def _draw(self, random: Random) -> Problem:
        problem = draw_countdown(random, 3, self.largest)
        numbers = ",".join(f"{number:2}" for number in problem.numbers)
        # As long as the longest, "99*10=990,990-99=891".
        answer = f"{problem.solution:20}"
        return Problem(f"{numbers}={problem.target:3}:", answer, len(re.findall(r"[*/]", answer)))
