"""How LLaDA and its autoregressive twin improve with what a training costs: a ladder of sizes, as in LLaDA's Figure 3.

    python tests/experiments/scaling.py --text FOLDER --output FOLDER [--results FOLDER] [--image FILE] [--quick | --scale]

The text is FOLDER/tinystories.txt (or FOLDER is a file of that kind), byte by byte, its last stories held out; rows are those of
objectives.py. A rung is a size and a number of tokens for both twins (twins.py), its cost 6 · N · D FLOPs (N parameters without
embedding and head, D tokens: the paper's count). The loss is in nats per byte of the held-out rows, the bound of LLaDA, the exact
−log p of its twin. Fitted is log loss = a − b · log FLOPs through the rungs of each seed, and how many times the twin's FLOPs
LLaDA needs for the loss it ends at, by the twin's fit.

Where a rung's FLOPs are in the range of Quokka's law (llada/plan/budget.py), what it expects of LLaDA there stands in a column of its
own, in nats per token of a vocabulary of 50,289; the rungs below are told to be so.

Each result is a file in --output when it is there; the same command goes on where it was. At the end it writes scaling.json into
--results, the table into --output/scaling.md and the figure into --image. --quick is to see that it runs, in seconds, --scale
for a GPU; both write into --output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from objectives_data import split_stories
from twins import (
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
    source_of,
    write_rows,
)

from llada.plan.budget import FITTED_FLOPS, expected_loss

NAMES = ("autoregressive", "LLaDA")


@dataclass(frozen=True)
class Size:
    """What an experiment costs."""

    rungs: tuple[Learning, ...]
    """Each with one rate: the rows of a choice would be those of the loss."""
    row_length: int
    held_out_rows: int


def rung(d_model: int, num_layers: int, num_steps: int, **others: Any) -> Learning:
    return Learning(
        num_steps=num_steps, batch_rows=16, rates=(0.02,), d_model=d_model, num_layers=num_layers, **others
    )


FULL = Size(
    tuple(
        rung(d_model, num_layers, num_steps, validation_rows=512)
        for d_model, num_layers, num_steps in ((32, 1, 125), (64, 2, 250), (96, 3, 500), (128, 4, 1_000))
    ),
    row_length=64,
    held_out_rows=512,
)
QUICK = Size(
    tuple(rung(32, 1, num_steps, seeds=(0, 1), validation_rows=8) for num_steps in (2, 6)),
    row_length=16,
    held_out_rows=8,
)
SCALE = Size(
    tuple(
        Learning(
            num_steps=num_steps, batch_rows=256, rates=(0.005,), d_model=d_model, num_layers=num_layers,
            validation_rows=512, precision="auto",
        )
        for d_model, num_layers, num_steps in (
            (128, 4, 1_000), (256, 6, 2_000), (512, 8, 4_000), (1024, 12, 8_000),
        )
    ),
    row_length=256,
    held_out_rows=512,
)  # fmt: skip


class Experiment:
    """The ladder on one text; what is done lies in `folder`."""

    def __init__(self, text: Path, folder: Path, size: Size) -> None:
        self.size, data = size, folder / "data"
        stories = text.read_bytes()
        self.settings = keep_settings(folder, {**asdict(size), "text": source_of(text)})

        def write_data() -> int:
            splits, vocab_size = split_stories(stories, size.row_length, {"validation": size.held_out_rows})
            write_rows(data, splits, vocab_size)
            return vocab_size

        vocab_size = once(folder / "data.json", write_data)
        self.rungs = [
            Twins(folder / f"rung-{number}", data, vocab_size, size.row_length, learning)
            for number, learning in enumerate(size.rungs)
        ]

    def run(self, number: int, name: str, seed: int) -> dict[str, Any]:
        """Of a rung; "validation_loss" in nats per byte."""
        return self.rungs[number].run(name, seed, lambda network, result: {})

    def flops(self, number: int) -> float:
        """6 · N · D, of the bytes that are asked for."""
        twins = self.rungs[number]
        tokens = twins.learning.rows * (twins.row_length - 1)
        return 6.0 * twins.network("LLaDA").num_non_embedding_parameters * tokens


def fit(flops: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """a and b of log loss = a − b · log FLOPs, by least squares."""
    slope, a = np.polyfit(np.log(flops), np.log(losses), 1)
    return float(a), float(-slope)


def summarise(experiment: Experiment, before: dict[str, Any]) -> dict[str, Any]:
    """All that is known, as the result has it."""
    numbers = range(len(experiment.rungs))
    seeds = experiment.size.rungs[0].seeds
    flops = [experiment.flops(number) for number in numbers]
    losses, fits, done = {}, {}, []
    for name in NAMES:
        runs = [[experiment.run(number, name, seed) for seed in seeds] for number in numbers]
        done += [run for of_rung in runs for run in of_rung]
        losses[name] = [[run["validation_loss"] for run in of_rung] for of_rung in runs]
        fits[name] = [fit(flops, of_seed) for of_seed in zip(*losses[name], strict=True)]
    # The twin's FLOPs, by its fit, for the loss at which LLaDA ends.
    factors = [
        flops[-1] / math.exp((a - math.log(loss)) / b)
        for (a, b), loss in zip(fits["autoregressive"], losses["LLaDA"][-1], strict=True)
    ]
    return {
        **head_of_report(before, done),
        "settings": experiment.settings,
        "flops": flops,
        "parameters": [twins.network("LLaDA").num_non_embedding_parameters for twins in experiment.rungs],
        "tokens": [twins.learning.rows * (twins.row_length - 1) for twins in experiment.rungs],
        "losses": losses,
        "exponents": {name: [b for _, b in fits[name]] for name in NAMES},
        "fits": fits,
        "factors": factors,
    }


def expected(flops: float, parameters: float, tokens: float) -> str:
    """Of LLaDA, by Quokka's law, in nats per token of its vocabulary."""
    if FITTED_FLOPS[0] <= flops <= FITTED_FLOPS[1]:
        return f"{expected_loss(parameters, tokens):.3f}"
    return f"{'below' if flops < FITTED_FLOPS[0] else 'above'} its range"


def table(report: dict[str, Any]) -> str:
    """Markdown: nats per byte by rung, and the exponents."""
    lines = [
        "| parameters without embeddings | bytes | FLOPs | autoregressive | LLaDA | Quokka's law |",
        "|---|---|---|---|---|---|",
    ]
    for number, flops in enumerate(report["flops"]):
        losses = ["{:.3f} ± {:.3f}".format(*mean_and_error(report["losses"][name][number])) for name in NAMES]
        size, tokens = report["parameters"][number], report["tokens"][number]
        law = expected(flops, size, tokens)
        lines.append(f"| {size:,} | {tokens:,} | {flops:.1e} | {' | '.join(losses)} | {law} |")
    exponents = ["{:.3f} ± {:.3f}".format(*mean_and_error(report["exponents"][name])) for name in NAMES]
    lines.append(f"| exponent b | | | {' | '.join(exponents)} | |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], target: Path) -> None:
    """Losses by FLOPs with the fits, and by bytes."""
    figure, (left, right) = draw_figure()
    for name, colour in zip(NAMES, ("tab:orange", "tab:blue"), strict=True):
        losses = np.array(report["losses"][name])
        (a, a_error), (b, b_error) = (
            mean_and_error(values) for values in zip(*report["fits"][name], strict=True)
        )
        del a_error
        for axis, places in ((left, report["flops"]), (right, report["tokens"])):
            for seed in losses.T:
                axis.plot(places, seed, "o", color=colour, markersize=4, alpha=0.6)
        ends = np.array([report["flops"][0], report["flops"][-1]])
        label = f"{name}, b = {b:.3f} ± {b_error:.3f}"
        left.plot(ends, np.exp(a) * ends**-b, color=colour, linewidth=1, label=label)
        right.plot([], [], "o", color=colour, label=name)
    left.set_xlabel("FLOPs, 6 · N · D")
    right.set_xlabel("bytes trained on")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        for numbers in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            numbers("{x:g}")
        axis.set_ylabel("nats per byte, held out")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    save_figure(figure, target)


def main(words: Sequence[str] | None = None) -> None:
    arguments = command_line(__doc__, text="tinystories.txt").parse_args(words)
    before = machine()
    size = QUICK if arguments.quick else SCALE if arguments.scale else FULL
    experiment = Experiment(arguments.text, arguments.output, size)
    for number in range(len(size.rungs)):
        for seed in size.rungs[0].seeds:
            for name in NAMES:
                experiment.run(number, name, seed)
    publish(summarise(experiment, before), "scaling", arguments, table, plot)


if __name__ == "__main__":
    main()
