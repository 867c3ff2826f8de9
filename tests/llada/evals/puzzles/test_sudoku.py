"""Puzzles against the rules, which are written down a second time here, and against counts that are known."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from llada.errors import UserError
from llada.evals.puzzles.sudoku import Box, Sudoku, board_text, canonical_form, disguise, draw_sudoku, solve

SMALL, OBLONG, USUAL = Box(2, 2), Box(2, 3), Box(3, 3)
# Wikipedia's puzzle.
KNOWN = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def numbers(text: str) -> tuple[int, ...]:
    return tuple(0 if sign == "." else int(sign) for sign in text)


def is_full_board(cells: tuple[int, ...], box: Box) -> bool:
    side = box.side
    rows = [set(cells[row * side : (row + 1) * side]) for row in range(side)]
    columns = [set(cells[column::side]) for column in range(side)]
    boxes = [
        {
            cells[(top + row) * side + left + column]
            for row in range(box.rows)
            for column in range(box.columns)
        }
        for top in range(0, side, box.rows)
        for left in range(0, side, box.columns)
    ]
    return all(unit == set(range(1, side + 1)) for unit in rows + columns + boxes)


def check(puzzle: Sudoku, box: Box) -> None:
    assert is_full_board(puzzle.solution, box)
    assert list(solve(puzzle.givens, box)) == [puzzle.solution]
    assert all(given in (0, cell) for given, cell in zip(*puzzle, strict=True))


def test_a_known_puzzle_has_its_one_solution():
    assert list(solve(numbers(KNOWN), USUAL)) == [numbers(SOLVED)]
    # Without its first two digits there are others.
    assert len(list(solve(numbers(".." + KNOWN[2:]), USUAL))) > 1
    assert list(solve(numbers("55" + KNOWN[2:]), USUAL)) == []


def test_all_boards_of_four_digits_are_found():
    boards = list(solve([0] * 16, SMALL))
    assert len(set(boards)) == len(boards) == 288
    assert all(is_full_board(board, SMALL) for board in boards)
    assert set(solve([0] * 16, SMALL, Random(0))) == set(boards)


@pytest.mark.parametrize("box, blanks", [(SMALL, 10), (OBLONG, 20), (Box(3, 2), 20), (USUAL, 45)])
def test_drawn_puzzles_have_one_solution(box: Box, blanks: int):
    for seed in range(5):
        puzzle = draw_sudoku(Random(seed), box, blanks)
        assert puzzle == draw_sudoku(Random(seed), box, blanks)
        assert puzzle.givens.count(0) == blanks
        check(puzzle, box)
    assert len({draw_sudoku(Random(seed), box, blanks) for seed in range(20)}) == 20


def test_no_more_cells_are_emptied_than_the_solution_allows():
    puzzle = draw_sudoku(Random(0), SMALL, 16)
    check(puzzle, SMALL)
    # Of four digits at least four have to be given, and here none could be left out.
    assert puzzle.givens.count(0) <= 12
    for cell, given in enumerate(puzzle.givens):
        if given:
            fewer = (*puzzle.givens[:cell], 0, *puzzle.givens[cell + 1 :])
            assert len(list(solve(fewer, SMALL))) > 1


def test_a_disguised_puzzle_is_another_with_one_solution():
    puzzle = draw_sudoku(Random(0), OBLONG, 18)
    forms = {disguise(puzzle, OBLONG, Random(seed)) for seed in range(20)}
    assert len(forms) == 20
    for form in forms:
        check(form, OBLONG)
        assert form.givens.count(0) == 18
    # Digits, rows and columns all change: the same cells are no longer empty, and one row's digits are no longer the same.
    assert len({tuple(given == 0 for given in form.givens) for form in forms}) > 10
    assert len({form.solution[:6] for form in forms}) > 15


def mirrored(puzzle: Sudoku, box: Box) -> Sudoku:
    cells = [column * box.side + row for row in range(box.side) for column in range(box.side)]
    return Sudoku(*(tuple(board[cell] for cell in cells) for board in puzzle))


@pytest.mark.parametrize("box, blanks", [(SMALL, 6), (OBLONG, 18), (Box(3, 2), 18), (USUAL, 45)])
def test_a_disguised_puzzle_keeps_its_canonical_form(box: Box, blanks: int):
    for seed in range(5):
        puzzle = draw_sudoku(Random(seed), box, blanks)
        form = canonical_form(puzzle, box)
        assert {canonical_form(disguise(puzzle, box, Random(turn)), box) for turn in range(10)} == {form}
        if box.rows == box.columns:
            assert canonical_form(mirrored(puzzle, box), box) == form


def test_a_canonical_form_is_one_of_the_puzzle_itself():
    """So that no two puzzles share it that are not the same: of four digits all 24 · 8 · 8 · 2 forms are written down."""
    orders = [order for order in itertools.permutations(range(4)) if order[0] // 2 == order[1] // 2]
    for seed, blanks in enumerate((0, 4, 6, 8)):
        puzzle = draw_sudoku(Random(seed), SMALL, blanks)
        forms = {
            Sudoku(*(tuple((0, *names)[board[row * 4 + column]] for row in rows for column in columns) for board in one))
            for one in (puzzle, mirrored(puzzle, SMALL))
            for rows, columns in itertools.product(orders, orders)
            for names in itertools.permutations((1, 2, 3, 4))
        }  # fmt: skip
        assert canonical_form(puzzle, SMALL) in forms
    # Essentially different boards of four digits: two, as is known.
    assert len({canonical_form(Sudoku(board, board), SMALL) for board in solve([0] * 16, SMALL)}) == 2


def test_a_board_as_text():
    assert board_text((1, 0, 3, 4, 3, 4, 0, 0, 0, 0, 0, 0, 2, 1, 4, 3), SMALL) == "1.34\n34..\n....\n2143\n"
    assert board_text(numbers(SOLVED), USUAL).split("\n")[1] == SOLVED[9:18]


def test_boards_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="4 × 3 cells: boards have 2 to 9 digits"):
        Box(4, 3)
    with pytest.raises(UserError, match="17 empty cells of a board of 16"):
        draw_sudoku(Random(0), SMALL, 17)
