"""Sudoku puzzles that have exactly one solution, by seed and with boxes of any shape: a task in which what comes first in the
text is not what is known first (arXiv 2410.14157: a small masked-diffusion network solves them, an autoregressive one does not).

A board of side s has s² cells in reading order; digits are 1 … s, an empty cell is 0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from llada.settings import require


@dataclass(frozen=True)
class Box:
    """The shape of a box; a board has as many boxes, rows and columns as a box has cells."""

    rows: int = 3
    columns: int = 3

    def __post_init__(self) -> None:
        require(
            self.rows >= 1 and self.columns >= 1 and 2 <= self.side <= 9,
            f"sudoku: a box of {self.rows} × {self.columns} cells: boards have 2 to 9 digits",
        )

    @property
    def side(self) -> int:
        return self.rows * self.columns


class Sudoku(NamedTuple):
    """Two boards (s²,)."""

    givens: tuple[int, ...]
    solution: tuple[int, ...]


def draw_sudoku(random: Random, box: Box, blanks: int) -> Sudoku:
    """A puzzle with `blanks` empty cells, or as many as its solution allows: cells of a full board are emptied in random order,
    but for those without which there would be a second solution.

    Raises UserError when a board has no so many cells.
    """
    cells = box.side**2
    require(0 <= blanks <= cells, f"sudoku: {blanks} empty cells of a board of {cells}")
    solution = next(solve([0] * cells, box, random))
    givens = list(solution)
    for cell in random.sample(range(cells), cells):
        if givens.count(0) == blanks:
            break
        givens[cell] = 0
        if len(list(itertools.islice(solve(givens, box), 2))) > 1:
            givens[cell] = solution[cell]
    return Sudoku(tuple(givens), solution)


def solve(givens: Sequence[int], box: Box, random: Random | None = None) -> Iterator[tuple[int, ...]]:
    """The boards (s²,) that fit the givens (s²,), one after the other; with `random` in a random order (not all orders are
    equally likely)."""
    side, cells = box.side, list(givens)
    places = _places(box)
    # Bit d of a unit (row, column or box): it has the digit d.
    used = [0] * (3 * side)
    for cell, digit in enumerate(cells):
        if digit:
            if any(used[unit] >> digit & 1 for unit in places[cell]):
                return
            for unit in places[cell]:
                used[unit] |= 1 << digit
    every_digit = (2 << side) - 2

    def search() -> Iterator[tuple[int, ...]]:
        # The empty cell with the fewest digits to choose from.
        best, options, fewest = -1, 0, side + 1
        for cell, digit in enumerate(cells):
            if digit:
                continue
            row, column, block = places[cell]
            free = every_digit & ~(used[row] | used[column] | used[block])
            if free.bit_count() < fewest:
                best, options, fewest = cell, free, free.bit_count()
                if fewest <= 1:
                    break
        if best < 0:
            yield tuple(cells)
            return
        digits = [digit for digit in range(1, side + 1) if options >> digit & 1]
        if random is not None:
            random.shuffle(digits)
        for digit in digits:
            cells[best] = digit
            for unit in places[best]:
                used[unit] ^= 1 << digit
            yield from search()
            for unit in places[best]:
                used[unit] ^= 1 << digit
        cells[best] = 0

    yield from search()


def disguise(puzzle: Sudoku, box: Box, random: Random) -> Sudoku:
    """The same puzzle to a solver, another one to the eye: digits renamed; bands of boxes, the rows of each, stacks of boxes
    and the columns of each in another order. It has one solution, too."""
    side = box.side
    names = [0, *random.sample(range(1, side + 1), side)]
    rows, columns = _reordered(side, box.rows, random), _reordered(side, box.columns, random)

    def change(board: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(names[board[row * side + column]] for row in rows for column in columns)

    return Sudoku(change(puzzle.givens), change(puzzle.solution))


def canonical_form(puzzle: Sudoku, box: Box) -> Sudoku:
    """The one form that all share which `disguise` makes of a puzzle, and those mirrored at the diagonal where boxes are square:
    of two puzzles it is equal exactly when a solver finds them to be the same.

    It is the smallest of `_ordered_forms`, which come out the same whatever form they are made from.
    """
    forms = list(_ordered_forms(puzzle, box))
    if box.rows == box.columns:
        forms += _ordered_forms(Sudoku(*(_mirrored(board, box) for board in puzzle)), box)
    return min(forms)


def board_text(cells: Sequence[int], box: Box) -> str:
    """A line for each row, each with its end; an empty cell is a dot."""
    signs = "".join("." if digit == 0 else str(digit) for digit in cells)
    return "".join(signs[start : start + box.side] + "\n" for start in range(0, len(signs), box.side))


def _reordered(side: int, size: int, random: Random) -> list[int]:
    """The numbers below `side`, of which groups of `size` stay together."""
    groups = [random.sample(range(start, start + size), size) for start in range(0, side, size)]
    random.shuffle(groups)
    return list(itertools.chain(*groups))


def _ordered_forms(puzzle: Sudoku, box: Box) -> Iterator[Sudoku]:
    """One for each order of the rows and each column that may be the first. By these two the rest is settled: the solution's first
    column reads 1, 2, … s, and its first row is increasing within a stack, and from stack to stack.

    Of the orders only those with the fewest empty cells first, in the bands and in each band's rows: of nine digits there are some
    fifty forms then (3 ms) instead of 1,296 · 9.
    """
    side, (givens, solution) = box.side, puzzle
    empty = [givens[start : start + side].count(0) for start in range(0, side**2, side)]
    for rows in _orders_by(empty, box.rows):
        for first in range(side):
            names = {0: 0} | {solution[row * side + first]: name for name, row in enumerate(rows, 1)}
            top = [names[digit] for digit in solution[rows[0] * side :][:side]]
            stacks = (
                sorted(range(start, start + box.columns), key=top.__getitem__)
                for start in range(0, side, box.columns)
            )
            columns = list(itertools.chain(*sorted(stacks, key=lambda stack: top[stack[0]])))
            cells = [row * side + column for row in rows for column in columns]
            yield Sudoku(*(tuple(names[board[cell]] for cell in cells) for board in puzzle))


def _orders_by(keys: Sequence[int], size: int) -> Iterator[list[int]]:
    """The numbers below `len(keys)` in all orders in which groups of `size` stay together, the keys do not fall within a group, and
    the groups' sorted keys do not fall from one to the next."""

    def rising(things: Iterable[Any], key: Callable[[Any], Any]) -> list[tuple[Any, ...]]:
        orders = itertools.permutations(things)
        return [order for order in orders if all(key(a) <= key(b) for a, b in itertools.pairwise(order))]

    groups = [range(start, start + size) for start in range(0, len(keys), size)]
    for order in rising(groups, lambda group: sorted(keys[number] for number in group)):
        for parts in itertools.product(*(rising(group, keys.__getitem__) for group in order)):
            yield list(itertools.chain(*parts))


def _mirrored(board: Sequence[int], box: Box) -> tuple[int, ...]:
    """Rows become columns."""
    return tuple(board[row * box.side + column] for column in range(box.side) for row in range(box.side))


@functools.cache
def _places(box: Box) -> list[tuple[int, int, int]]:
    """Of each cell its row, its column and its box, numbered through."""
    side = box.side
    return [
        (row, side + column, 2 * side + row // box.rows * box.rows + column // box.columns)
        for row in range(side)
        for column in range(side)
    ]
