"""Puzzles whose answer has to be known as a whole before its first sign can be: LLaDA and its autoregressive twin.

    python tests/experiments/planning.py sudoku|countdown --output FOLDER [--results FOLDER] [--image FILE] [--quick | --scale]

The twins (twins.py) learn to write the answer behind the puzzle, from puzzles that are drawn by seed, and are asked for puzzles
that none of them has seen in any form. An answer counts when all of it is right. The autoregressive twin writes it from left to
right, the likeliest token each time. LLaDA does so in one forward for each token, or in fewer, and commits at each forward
    confidence   the tokens it is surest of (`low_confidence`, LLaDA's own rule)
    margin       those that are clearest by their margin over the next best
    random       any
    leftmost     the first from the left, so that the order is the twin's
    blocks       the surest of the current third of the answer, from left to right
    dual cache   the same with all but that third as it was at its first forward

sudoku: boards with one solution, of four digits or, with --scale, of nine, a line for each row; "level" is the number of empty
cells. The training's are a thousand drawn ones with digits, rows and columns in ever new orders; none that is asked for is one of
them in another order, or mirrored.
countdown: a target from three numbers of one digit or, with --scale, of two, by steps; right is every way to it. "level" is how many of the two steps multiply or
divide.

Each result is a file in --output when it is there; the same command goes on where it was. At the end it writes <game>.json into
--results, the table into --output/<game>.md and the figure into --image. --quick is to see that it runs, in seconds, --scale for
a GPU (networks of 5.8 M parameters); both write into --output.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from planning_games import CountdownGame, Problem, SudokuGame
from torch import Tensor
from twins import (
    FIRST_SIGN,
    Learning,
    Twins,
    command_line,
    draw_figure,
    head_of_report,
    keep_settings,
    machine,
    mean_and_error,
    once,
    publish,
    save_figure,
    write_left_to_right,
    write_rows,
)

from llada.evals.puzzles.sudoku import Box
from llada.model.transformer import Transformer
from llada.sampling.generate import generate
from llada.training.trainer import TrainResult

BATCH_ROWS = 256  # of a forward while puzzles are solved
MOST_PUZZLES = 200_000  # to train on; longer trainings see them again


@dataclass(frozen=True)
class Strategy:
    """How LLaDA writes an answer."""

    remasking: str = "low_confidence"
    blocks: int = 1
    cache: str | None = None
    is_fewer: bool = True
    """There is something to be had by fewer forwards than tokens."""


STRATEGIES = {
    "confidence": Strategy(),
    "margin": Strategy("margin"),
    "random": Strategy("random"),
    "leftmost": Strategy("leftmost", is_fewer=False),
    "blocks": Strategy(blocks=3),
    "dual cache": Strategy(blocks=3, cache="dual"),
}


@dataclass(frozen=True)
class Size:
    """What an experiment costs."""

    game: SudokuGame | CountdownGame
    learning: Learning
    asked: int
    """Puzzles of each level."""
    forwards: tuple[int, ...]
    """Of an answer, the most first: one for each token."""


COMMITTED = {
    "sudoku": Size(
        SudokuGame(Box(2, 2), blanks=(4, 6, 8, 10), drawn=1_000),
        Learning(num_steps=200, batch_rows=64, rates=(0.01, 0.02), d_model=64, num_layers=3),
        asked=24,
        forwards=(20, 5, 1),
    ),
    "countdown": Size(
        CountdownGame(largest=9),
        Learning(num_steps=1_500, batch_rows=64, rates=(0.02,), d_model=64, num_layers=3),
        asked=32,
        forwards=(20, 10, 5, 1),
    ),
}
_SECONDS = Learning(
    num_steps=6, batch_rows=8, rates=(0.02,), d_model=32, num_layers=1, seeds=(0, 1), validation_rows=8
)
QUICK = {
    "sudoku": Size(SudokuGame(Box(2, 2), blanks=(2, 6), drawn=20), _SECONDS, asked=4, forwards=(20, 4)),
    "countdown": Size(CountdownGame(), _SECONDS, asked=2, forwards=(20, 2)),
}
_ON_A_GPU = Learning(
    num_steps=3_000,
    batch_rows=512,
    rates=(0.01,),
    d_model=384,
    num_layers=3,
    precision="auto",
    compiled=True,
)
SCALE = {
    "sudoku": Size(
        SudokuGame(Box(3, 3), blanks=(30, 36, 42, 48), drawn=10_000),
        _ON_A_GPU,
        asked=64,
        forwards=(90, 45, 15, 5, 1),
    ),
    "countdown": Size(CountdownGame(), _ON_A_GPU, asked=256, forwards=(20, 10, 5, 1)),
}


def tokens_of(texts: Sequence[str], signs: str) -> np.ndarray:
    """(N, L) ids of texts of one length."""
    return np.array([[signs.index(sign) for sign in text] for text in texts]) + FIRST_SIGN


def write_data(size: Size, asked: Sequence[Problem], folder: Path) -> dict[str, Any]:
    """The prepared folder; no puzzle of the training is one of the asked, nor of the validation."""
    validation = size.game.asked(-(-size.learning.validation_rows // len(size.game.levels)), "validation")
    hidden = set(map(size.game.same, [*asked, *validation]))
    seen = itertools.islice(size.game.training(hidden), min(size.learning.rows, MOST_PUZZLES))
    rows = {"train": list(seen), "validation": validation}
    splits = {
        split: (
            tokens_of([problem.prompt + problem.answer for problem in problems], size.game.signs),
            np.full(len(problems), len(problems[0].prompt)),
        )
        for split, problems in rows.items()
    }
    write_rows(folder, splits, FIRST_SIGN + len(size.game.signs))
    return {"row_length": splits["train"][0].shape[1]}


def solve_left_to_right(network: Transformer, prompts: Tensor, length: int) -> Tensor:
    """(N, length) of the autoregressive twin."""
    return torch.cat([write_left_to_right(network, some, length) for some in prompts.split(BATCH_ROWS)])


def solve_by(strategy: Strategy, network: Transformer, prompts: Tensor, length: int, forwards: int) -> Tensor:
    """(N, length) of LLaDA."""
    return torch.cat(
        [
            generate(
                network,
                some,
                gen_length=length,
                block_length=-(-length // strategy.blocks),
                steps=forwards,
                remasking=strategy.remasking,
                cache=strategy.cache,
                seed=0,
            ).sequences[:, prompts.shape[1] :]
            for some in prompts.split(BATCH_ROWS)
        ]
    )


class Experiment:
    """The twins and the puzzles they are asked for; what is done lies in `folder`."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.size = size
        self.settings = keep_settings(folder, asdict(size))
        self.asked = size.game.asked(size.asked, "asked")
        data = folder / "data"
        shape = once(folder / "data.json", lambda: write_data(size, self.asked, data))
        self.twins = Twins(
            folder, data, FIRST_SIGN + len(size.game.signs), shape["row_length"], size.learning
        )
        self.prompts = torch.from_numpy(tokens_of([p.prompt for p in self.asked], size.game.signs))
        self.answers = torch.from_numpy(tokens_of([p.answer for p in self.asked], size.game.signs))

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """{"solved": {strategy: {forwards: share}}, "by_level": {level: share}, of the twin or of confidence with one forward
        for each token, "signs": the share of right signs of the same, …}."""

        def measure(network: Transformer, result: TrainResult) -> dict[str, Any]:
            length, most = self.answers.shape[1], self.size.forwards[0]
            written: dict[tuple[str, int], Tensor] = {}
            if name == "autoregressive":
                written["left to right", most] = solve_left_to_right(network, self.prompts, length)
            else:
                for label, strategy in STRATEGIES.items():
                    for forwards in self.size.forwards[: None if strategy.is_fewer else 1]:
                        if forwards >= strategy.blocks:
                            answers = solve_by(strategy, network, self.prompts, length, forwards)
                            written[label, forwards] = answers
            shares: dict[str, dict[str, float]] = {}
            for (label, forwards), answers in written.items():
                shares.setdefault(label, {})[str(forwards)] = float(self.solved(answers).float().mean())
            first = next(iter(written.values()))
            solved, levels = self.solved(first), torch.tensor([problem.level for problem in self.asked])
            return {
                "solved": shares,
                "by_level": {
                    str(level): float(solved[levels == level].float().mean())
                    for level in self.size.game.levels
                },
                "signs": float((first.cpu() == self.answers).float().mean()),
            }

        return self.twins.run(name, seed, measure)

    def solved(self, written: Tensor) -> Tensor:
        """(N,) bool: which of the answers (N, length) are right."""
        signs = "\0" * FIRST_SIGN + self.size.game.signs
        texts = ["".join(signs[token] for token in answer) for answer in written.tolist()]
        return torch.tensor([self.size.game.is_solved(*both) for both in zip(self.asked, texts, strict=True)])


def summarise(experiment: Experiment, before: dict[str, Any]) -> dict[str, Any]:
    """All that is known, as the result has it."""
    seeds = experiment.size.learning.seeds
    rows, done, levels, signs = [], [], {}, {}
    for name in ("autoregressive", "LLaDA"):
        runs = [experiment.run(name, seed) for seed in seeds]
        done += runs
        for strategy, by_forwards in runs[0]["solved"].items():
            shares = {
                forwards: [run["solved"][strategy][forwards] for run in runs] for forwards in by_forwards
            }
            rows.append({"network": name, "strategy": strategy, "solved": shares})
        levels[name] = {level: [run["by_level"][level] for run in runs] for level in runs[0]["by_level"]}
        signs[name] = mean_and_error([run["signs"] for run in runs])
    return {
        **head_of_report(before, done),
        "settings": experiment.settings,
        "parameters": experiment.twins.network("LLaDA").num_parameters,
        "tokens": done[0]["tokens"],
        "asked": len(experiment.asked),
        "rates": {name: experiment.twins.choose_rate(name) for name in ("autoregressive", "LLaDA")},
        "right_signs": signs,
        "level_name": experiment.size.game.level_name,
        "by_level": levels,
        "rows": rows,
    }


def percent(shares: Sequence[float]) -> str:
    return "{:.1f} ± {:.1f}".format(*(100 * value for value in mean_and_error(shares)))


def table(report: dict[str, Any]) -> str:
    """Markdown: solved puzzles in percent."""
    forwards = [str(number) for number in report["settings"]["forwards"]]
    lines = [
        "| order | " + " | ".join(f"{number} forwards" for number in forwards) + " |",
        "|---" * (len(forwards) + 1) + "|",
    ]
    for row in report["rows"]:
        name = "autoregressive" if row["network"] == "autoregressive" else f"LLaDA, {row['strategy']}"
        cells = [percent(row["solved"][number]) if number in row["solved"] else "–" for number in forwards]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines).replace(" 1 forwards", " 1 forward") + "\n"


def plot(report: dict[str, Any], target: Path) -> None:
    """Solved puzzles by how many cells are empty, and by forwards."""
    figure, (left, right) = draw_figure()

    def draw(axis: Any, shares: dict[str, list[float]], label: str, colour: str) -> None:
        places = [int(place) for place in shares]
        means, errors = zip(*(mean_and_error(values) for values in shares.values()), strict=True)
        axis.errorbar(
            places,
            [100 * mean for mean in means],
            yerr=[100 * error for error in errors],
            fmt="o-",
            color=colour,
            label=label,
            markersize=4,
        )

    draw(left, report["by_level"]["LLaDA"], "LLaDA, confidence", "tab:blue")
    draw(left, report["by_level"]["autoregressive"], "autoregressive", "tab:orange")
    left.set_xticks([int(level) for level in report["by_level"]["LLaDA"]])
    left.set_xlabel(report["level_name"])
    colours = {
        "left to right": "tab:orange", "confidence": "tab:blue", "margin": "tab:green", "random": "tab:red", "leftmost": "grey",
        "blocks": "tab:purple", "dual cache": "tab:brown",
    }  # fmt: skip
    for row in report["rows"]:
        name = "autoregressive" if row["network"] == "autoregressive" else f"LLaDA, {row['strategy']}"
        draw(right, row["solved"], name, colours[row["strategy"]])
    right.set_xscale("log")
    forwards = sorted({int(number) for row in report["rows"] for number in row["solved"]})
    right.set_xticks(forwards, [str(number) for number in forwards])
    right.minorticks_off()
    right.set_xlabel("forwards of an answer")
    for axis in (left, right):
        axis.set_ylabel("puzzles solved, %")
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, target)


def main(words: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("game", choices=tuple(COMMITTED))
    arguments = parser.parse_args(words)
    before = machine()
    sizes = QUICK if arguments.quick else SCALE if arguments.scale else COMMITTED
    size = sizes[arguments.game]
    experiment = Experiment(arguments.output, size)
    for seed in size.learning.seeds:
        for name in ("LLaDA", "autoregressive"):
            experiment.run(name, seed)
    publish(summarise(experiment, before), arguments.game, arguments, table, plot)


if __name__ == "__main__":
    main()
