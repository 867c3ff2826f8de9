"""How well LLaDA and its autoregressive twin predict a text, in bits per character; and whether the bound is what it says.

    python tests/experiments/bits_per_character.py --text FOLDER --output FOLDER [--results FOLDER] [--image FILE] [--quick | --scale]

The text is FOLDER/tinyshakespeare.txt (1,115,394 characters of 65 kinds, karpathy/char-rnn), split as usual: the first 90 % to
train on, the last 10 % held out. Learning rates, and the points of the curves, are of rows at the end of the first part, which nothing is
trained on. Rows are an end-of-text token, which both twins (twins.py) see and neither predicts, and the
next characters, so that both are asked for the same ones and know as much of what stands before them. The autoregressive figure
is the exact −log p of the held-out text, LLaDA's the bound by `llada.perplexity_bound`.

Beside it a toy language, whose entropy is known: strings of TOY_LENGTH letters by a Markov chain. There the bound is also summed
over every mask of every string, and says whether the estimate is right; neither network can be below the entropy.

Each result is a file in --output when it is there; the same command goes on where it was. At the end it writes
bits_per_character.json into --results, the table into --output/bits_per_character.md and the figure into --image. --quick is to
see that it runs, in seconds, --scale for a GPU (11.6 M parameters, of the size of nanoGPT; rows of 256); both write into --output.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from objectives_data import behind_ends, behind_first, left_to_right_nats, number_bytes, rows_of
from torch import Tensor
from twins import (
    FIRST_SIGN,
    MASK,
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

from llada.diffusion.likelihood import perplexity_bound
from llada.model.predict import device_of
from llada.model.transformer import Transformer
from llada.training.trainer import TrainResult

HELD_OUT = 0.1
NAMES = ("autoregressive", "LLaDA")
# The toy language: P(next letter | letter), the first letter by the chain's own distribution.
TOY_LENGTH = 6
TRANSITIONS = np.array([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2]])


@dataclass(frozen=True)
class Size:
    """What an experiment costs."""

    learning: Learning
    row_length: int
    num_samples: int
    """Masks of each held-out row."""
    toy: Learning


FULL = Size(
    Learning(num_steps=300, batch_rows=16, rates=(0.01, 0.03), d_model=64, num_layers=2, validations=6),
    row_length=64,
    num_samples=4,
    toy=Learning(num_steps=100, batch_rows=64, rates=(0.02,), d_model=32, num_layers=2),
)
QUICK = Size(
    Learning(num_steps=8, batch_rows=4, rates=(0.02,), d_model=32, num_layers=1, seeds=(0, 1), validation_rows=32, validations=2),
    row_length=16,
    num_samples=4,
    toy=Learning(num_steps=8, batch_rows=8, rates=(0.02,), d_model=32, num_layers=1, seeds=(0, 1), validation_rows=8),
)  # fmt: skip
SCALE = Size(
    Learning(
        num_steps=10_000, batch_rows=64, rates=(0.003, 0.01), d_model=384, num_layers=6,
        validation_rows=400, validations=20, precision="auto",
    ),
    row_length=256,
    num_samples=32,
    toy=FULL.toy,
)  # fmt: skip


class Text:
    """The twins on the text."""

    def __init__(self, file: Path, folder: Path, size: Size) -> None:
        self.size, data = size, folder / "data"
        ids = number_bytes(file.read_bytes())
        self.symbols = int(ids.max()) + 1 - FIRST_SIGN
        first_held_out = int(len(ids) * (1 - HELD_OUT))

        def write_data() -> dict[str, int]:
            rows, prompts = behind_ends(ids[:first_held_out], size.row_length)
            border = len(rows) - size.learning.validation_rows
            splits = {
                "train": (rows[:border], prompts[:border]),
                "validation": (rows[border:], prompts[border:]),
                "held_out": behind_ends(ids[first_held_out:], size.row_length),
            }
            write_rows(data, splits, FIRST_SIGN + self.symbols)
            return {split: rows.shape[0] for split, (rows, _) in splits.items()}

        self.rows = once(folder / "data.json", write_data)
        self.twins = Twins(folder, data, FIRST_SIGN + self.symbols, size.row_length, size.learning)
        self.held_out = rows_of(data, "held_out")

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """{"bits": per character, "standard_error": of its estimate, …}."""

        def measure(network: Transformer, result: TrainResult) -> dict[str, Any]:
            if name == "autoregressive":
                nats, error = float(left_to_right_nats(network, self.held_out).mean()), 0.0
                nats /= self.size.row_length - 1
            else:
                nats, error = perplexity_bound(
                    network,
                    self.held_out,
                    maskable=behind_first(self.held_out),
                    num_samples=self.size.num_samples,
                )
            return {"bits": nats / math.log(2), "standard_error": error / math.log(2)}

        return self.twins.run(name, seed, measure)


class Toy:
    """The twins on the toy language."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.learning, data = size.toy, folder / "toy" / "data"
        letters = np.array(list(itertools.product(range(3), repeat=TOY_LENGTH)))
        first = stationary(TRANSITIONS)
        p = first[letters[:, 0]] * TRANSITIONS[letters[:, :-1], letters[:, 1:]].prod(1)
        self.p = torch.from_numpy(p)
        self.entropy = float(-(p * np.log2(p)).sum() / TOY_LENGTH)
        rows, prompts = behind_ends(letters.ravel() + FIRST_SIGN, TOY_LENGTH + 1)
        self.strings = torch.from_numpy(rows.astype(np.int64))
        draws = np.random.default_rng(0).choice(
            len(p), self.learning.rows + self.learning.validation_rows, p=p
        )

        def write_data() -> int:
            parts = {
                "train": draws[: self.learning.rows],
                "validation": draws[self.learning.rows :],
            }
            splits = {split: (rows[part], prompts[part]) for split, part in parts.items()}
            write_rows(data, splits, FIRST_SIGN + 3)
            return len(draws)

        once(folder / "toy" / "data.json", write_data)
        self.twins = Twins(folder / "toy", data, FIRST_SIGN + 3, TOY_LENGTH + 1, self.learning)
        # The strings that the estimate is made of: as likely as in the language.
        self.asked = self.strings[np.random.default_rng(1).choice(len(p), 256, p=p)]

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """{"bits": per letter, summed over the language, …}, and of LLaDA, on strings of the language, the sum over all masks
        ("enumerated") with the estimate and its standard error."""

        def measure(network: Transformer, result: TrainResult) -> dict[str, Any]:
            per_letter = TOY_LENGTH * math.log(2)
            if name == "autoregressive":
                nats = left_to_right_nats(network, self.strings)
                return {"bits": float((self.p * nats).sum()) / per_letter}
            nats = enumerated_nats(network, self.strings)
            index = {tuple(string.tolist()): number for number, string in enumerate(self.strings)}
            asked = torch.tensor([index[tuple(string.tolist())] for string in self.asked])
            estimate, error = perplexity_bound(
                network, self.asked, maskable=behind_first(self.asked), num_samples=8
            )
            return {
                "bits": float((self.p * nats).sum()) / per_letter,
                "enumerated": float(nats[asked].mean()) / per_letter,
                "estimate": estimate / math.log(2),
                "standard_error": error / math.log(2),
            }

        return self.twins.run(name, seed, measure)


def stationary(transitions: np.ndarray) -> np.ndarray:
    """(S,) the distribution that a chain's step (S, S) leaves as it is."""
    return np.linalg.matrix_power(transitions, 1000)[0]


@torch.no_grad()
def enumerated_nats(network: Transformer, rows: Tensor) -> Tensor:
    """(B,) the bound of −log p of the rows' T tokens behind the first, (B, 1 + T): the sum over all masks.

    With l uniform on {1 … T}, a mask of l tokens uniform among its C(T, l), and the weight T / l (LLaDA, Eq. 6), a mask
    counts 1 / (l · C(T, l)).
    """
    T = rows.shape[1] - 1
    rows = rows.to(device_of(network))
    total = torch.zeros(len(rows), dtype=torch.float64)
    for mask in itertools.product((False, True), repeat=T):
        masked = torch.tensor([False, *mask], device=rows.device)
        hidden = int(masked.sum())
        if hidden:
            logits = network(torch.where(masked, MASK, rows))[:, masked].double()
            logits[..., MASK] = -torch.inf  # what was masked is no mask
            log_p = logits.log_softmax(-1).gather(2, rows[:, masked, None])
            total -= log_p.sum((1, 2)).cpu() / (hidden * math.comb(T, hidden))
    return total


def summarise(text: Text, toy: Toy, settings: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """All that is known, as the result has it."""
    rows, done = [], []
    for name in NAMES:
        runs = [text.run(name, seed) for seed in text.size.learning.seeds]
        toys = [toy.run(name, seed) for seed in toy.learning.seeds]
        done += runs + toys
        row = {
            "network": name,
            "bits": [run["bits"] for run in runs],
            "estimate_error": [run["standard_error"] for run in runs],
            "curves": [run["curve"] for run in runs],
            "rate": text.twins.choose_rate(name),
            "toy_bits": [run["bits"] for run in toys],
        }
        if name == "LLaDA":
            row |= {key: [run[key] for run in toys] for key in ("enumerated", "estimate", "standard_error")}
        rows.append(row)
    return {
        **head_of_report(before, done),
        "settings": settings,
        "parameters": text.twins.network("LLaDA").num_parameters,
        "tokens": done[0]["tokens"],
        "symbols": text.symbols,
        "rows_of_split": text.rows,
        "held_out_characters": len(text.held_out) * (text.size.row_length - 1),
        "toy_entropy": toy.entropy,
        "rows": rows,
    }


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"| | bits per character | toy language, entropy {report['toy_entropy']:.4f} |",
        "|---|---|---|",
    ]
    kinds = {"autoregressive": "autoregressive, exact", "LLaDA": "LLaDA, bound"}
    for row in report["rows"]:
        figures = [
            "{:.{digits}f} ± {:.{digits}f}".format(*mean_and_error(row[key]), digits=digits)
            for key, digits in (("bits", 3), ("toy_bits", 4))
        ]
        lines.append(f"| {' | '.join([kinds[row['network']], *figures])} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], target: Path) -> None:
    """The curves of the text, and the estimated beside the enumerated bounds of the toy language."""
    figure, (left, right) = draw_figure()
    per_step = report["tokens"] / report["settings"]["learning"]["num_steps"]
    for row, colour in zip(report["rows"], ("tab:orange", "tab:blue"), strict=True):
        curves = np.array(row["curves"])
        tokens, bits = curves[0, :, 0] * per_step / 1e6, curves[:, :, 1] / math.log(2)
        left.plot(tokens, bits.mean(0), "o-", color=colour, markersize=4, label=row["network"])
        left.fill_between(tokens, bits.min(0), bits.max(0), color=colour, alpha=0.2)
    left.set_xlabel("million characters trained on")
    left.set_ylabel("bits per character, rows of the rate's choice")
    left.legend()
    (row,) = (row for row in report["rows"] if row["network"] == "LLaDA")
    right.errorbar(
        row["enumerated"],
        row["estimate"],
        yerr=row["standard_error"],
        fmt="o",
        color="tab:blue",
        label="a seed",
    )
    ends = [
        min(*row["enumerated"], *row["estimate"]) - 0.02,
        max(*row["enumerated"], *row["estimate"]) + 0.02,
    ]
    right.plot(ends, ends, color="grey", linewidth=1)
    right.set_xlabel("bound of the toy language, all masks, bits per letter")
    right.set_ylabel("estimated")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save_figure(figure, target)


def main(words: Sequence[str] | None = None) -> None:
    arguments = command_line(__doc__, text="tinyshakespeare.txt").parse_args(words)
    before = machine()
    size = QUICK if arguments.quick else SCALE if arguments.scale else FULL
    file = arguments.text
    settings = keep_settings(arguments.output, {**asdict(size), "text": source_of(file)})
    text, toy = Text(file, arguments.output, size), Toy(arguments.output, size)
    for name in NAMES:
        for seed in toy.learning.seeds:
            toy.run(name, seed)
    for seed in size.learning.seeds:
        for name in NAMES:
            text.run(name, seed)
    publish(summarise(text, toy, settings, before), "bits_per_character", arguments, table, plot)


if __name__ == "__main__":
    main()
