"""The experiment on little data, as a user runs it, and what it counts as solved."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from llada.data.tokens.shards import TokenDataset
from llada.evals.puzzles.sudoku import Box, solve

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def done(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sudoku")
    script.main(["sudoku", "--output", str(folder), "--quick"])
    return folder


def test_every_order_has_its_numbers(script: ModuleType, done: Path):
    report = json.loads((done / "sudoku.json").read_text())
    assert [row["strategy"] for row in report["rows"]] == ["left to right", *script.STRATEGIES]
    seeds = len(report["settings"]["learning"]["seeds"])
    for row in report["rows"]:
        assert all(len(shares) == seeds for shares in row["solved"].values())
        assert "20" in row["solved"]
    assert 0 < report["right_signs"]["LLaDA"][0] < 1
    assert (done / "sudoku.png").stat().st_size > 10_000
    assert "| LLaDA, margin |" in (done / "sudoku.md").read_text()


def test_rows_are_puzzles_with_their_solutions_and_what_is_asked_is_no_form_of_them(
    script: ModuleType, done: Path
):
    size, signs = script.QUICK["sudoku"], script.SudokuGame.signs
    dataset = TokenDataset(str(done / "data"), "train")
    rows = dataset.rows(np.arange(len(dataset)))
    assert len(dataset) == size.learning.rows
    assert (rows.maskable.sum(1) == 20).all()
    for tokens in rows.tokens[:20]:
        text = "".join(signs[token - script.FIRST_SIGN] for token in tokens)
        puzzle, answer = (part.replace("\n", "") for part in (text[:20], text[20:]))
        givens = [0 if sign == "." else int(sign) for sign in puzzle]
        assert list(solve(givens, Box(2, 2))) == [tuple(map(int, answer))]
        assert givens.count(0) in size.game.blanks
    asked = size.game.asked(size.asked, "asked")
    assert [problem.level for problem in asked] == [2] * 4 + [6] * 4
    trained = {"".join(signs[token - script.FIRST_SIGN] for token in tokens[:20]) for tokens in rows.tokens}
    assert set(map(smallest_form, trained)).isdisjoint(smallest_form(problem.prompt) for problem in asked)


def smallest_form(puzzle: str) -> str:
    """Of all that digits' names, bands, rows, stacks, columns and the diagonal make of a puzzle of four digits (20,)."""
    lines = puzzle.splitlines()
    orders = [order for order in itertools.permutations(range(4)) if order[0] // 2 == order[1] // 2]
    forms = []
    for board in (lines, list(zip(*lines, strict=True))):
        for rows, columns in itertools.product(orders, orders):
            signs = [board[row][column] for row in rows for column in columns]
            digits = dict.fromkeys(sign for sign in signs if sign != ".")
            names = {digit: str(name) for name, digit in enumerate(digits)}
            forms.append("".join(names.get(sign, ".") for sign in signs))
    return min(forms)


def test_training_puzzles_do_not_repeat_but_in_another_form(script: ModuleType):
    game = script.SudokuGame(Box(2, 3), blanks=(12,), drawn=5)
    prompts = [problem.prompt for problem in itertools.islice(game.training(hidden=()), 40)]
    assert len(set(prompts)) == 40


def test_all_signs_of_an_answer_have_to_be_right(script: ModuleType, done: Path):
    experiment = script.Experiment(done, script.QUICK["sudoku"])
    written = experiment.answers.clone()
    assert experiment.solved(written).all()
    written[0, 3] += 1
    written[1] = 0
    assert experiment.solved(written).tolist() == [False, False] + [True] * 6
    assert torch.equal(experiment.prompts[:, 4], experiment.answers[:, 4]), "ends of lines"


def test_countdown_counts_every_way_to_the_target(script: ModuleType):
    game = script.CountdownGame()
    problems = [*game.asked(20, "a"), *itertools.islice(game.training(hidden=()), 500)]
    assert len({(len(problem.prompt), len(problem.answer)) for problem in problems}) == 1
    assert set(itertools.chain(*(problem.prompt + problem.answer for problem in problems))) == set(game.signs)
    assert [problem.level for problem in problems[:60]] == [0] * 20 + [1] * 20 + [2] * 20
    assert all(game.is_solved(problem, problem.answer) for problem in problems)
    problem = script.Problem(" 7,12, 5= 53:", "12*5=60,60-7=53       ", 1)
    assert game.is_solved(problem, "5*12=60,60-7=53".ljust(20))
    assert not game.is_solved(problem, "5*12=60,60-8=52".ljust(20))
    assert not game.is_solved(problem, "\0" * 20)


@pytest.mark.parametrize("game", ["sudoku", "countdown"])
def test_the_readme_shows_the_committed_result(script: ModuleType, game: str):
    report = json.loads((HERE / "results" / f"{game}.json").read_text())
    assert script.table(report) in (HERE.parents[1] / "README.md").read_text()


def test_no_countdown_that_is_held_out_is_trained_with_its_numbers_in_another_order(
    script: ModuleType, tmp_path: Path
):
    """Of numbers up to four there are few problems, most of them drawn again and again."""
    size = replace(script.QUICK["countdown"], game=script.CountdownGame(largest=4), asked=4)
    asked = size.game.asked(size.asked, "asked")
    script.write_data(size, asked, tmp_path)

    def texts(split: str) -> list[str]:
        dataset = TokenDataset(str(tmp_path), split)
        rows = dataset.rows(np.arange(len(dataset)))
        return [
            "".join(script.CountdownGame.signs[token - script.FIRST_SIGN] for token in row)
            for row in rows.tokens
        ]

    def problem_of(prompt: str) -> tuple[tuple[int, ...], int]:
        numbers, target = prompt.partition(":")[0].split("=")
        return tuple(sorted(map(int, numbers.split(",")))), int(target)

    trained = {problem_of(text) for text in texts("train")}
    assert trained.isdisjoint(problem_of(problem.prompt) for problem in asked)
    assert trained.isdisjoint(problem_of(text) for text in texts("validation"))
