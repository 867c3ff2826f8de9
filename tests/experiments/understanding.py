"""Whether a network that has learned to write a language understands it: the sentiment of Korean film reviews (NSMC).

    python tests/experiments/understanding.py --text FOLDER --output FOLDER [--results FOLDER] [--image FILE] [--quick | --scale]

Twins (twins.py) learn the reviews of FOLDER/nsmc_20k.jsonl.gz without their ratings: LLaDA, BERT with its 15 % of masks, and an
autoregressive network. Then each gets a head over the mean of its last layer, and is fine-tuned with it on labelled reviews, as
`llada evaluate --tasks understanding` does; beside them stands a network that has learned nothing before. As in NSMC a rating of
at most 4 is negative, of at least 9 positive, and those between have no label. A token is a character; the reviews that are
judged are among nothing that is learned.

Each result is a file in --output when it is there; the same command goes on where it was. At the end it writes understanding.json
into --results, the table into --output/understanding.md and the figure into --image. --quick is to see that it runs, in seconds,
--scale for a GPU; both write into --output.
"""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from twins import (
    EOS,
    FIRST_SIGN,
    TWINS,
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

from llada.diffusion.objective import ObjectiveConfig
from llada.model.transformer import Transformer
from llada.training.trainer import TrainResult
from llada.understanding.classifier import Classifier
from llada.understanding.config import UnderstandingConfig
from llada.understanding.finetune import answers, finetune

OBJECTIVES = {**TWINS, "BERT 15 %": ObjectiveConfig(schedule="bert", document_mask=False)}
UNTRAINED = "nothing learned before"
RAREST = 5  # characters that stand in fewer reviews are one sign


@dataclass(frozen=True)
class Size:
    """What an experiment costs."""

    learning: Learning
    finetuning: UnderstandingConfig
    labelled: int
    """Reviews to fine-tune on."""
    judged: int
    row_length: int = 48


FULL = Size(
    Learning(num_steps=800, batch_rows=32, rates=(0.01, 0.02), d_model=64, num_layers=2),
    UnderstandingConfig(num_epochs=4, lr=1e-3),
    labelled=2000,
    judged=2000,
)
QUICK = Size(
    Learning(num_steps=4, batch_rows=4, rates=(0.01,), d_model=32, num_layers=1, seeds=(0, 1), validation_rows=4),
    UnderstandingConfig(num_epochs=1, lr=1e-3),
    labelled=16,
    judged=16,
    row_length=16,
)  # fmt: skip
SCALE = Size(
    Learning(
        num_steps=6000, batch_rows=256, rates=(0.003, 0.01), d_model=512, num_layers=8, precision="auto"
    ),
    UnderstandingConfig(num_epochs=4, lr=1e-4),
    labelled=8000,
    judged=4000,
)


def label_of(rating: int) -> int | None:
    """0 of a negative review, 1 of a positive one."""
    return 0 if rating <= 4 else 1 if rating >= 9 else None


def read_reviews(file: Path) -> list[tuple[str, int]]:
    """(text, rating) of the reviews, each text once."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return list({row["text"]: int(row["rating"]) for row in rows if row["text"].strip()}.items())


class Experiment:
    """The twins and the reviews; what is done lies in `folder`."""

    def __init__(self, text: Path, folder: Path, size: Size) -> None:
        self.size = size
        self.settings = keep_settings(folder, {**asdict(size), "text": source_of(text)})
        reviews = read_reviews(text)
        order = np.random.default_rng(0).permutation(len(reviews))
        with_label = [int(at) for at in order if label_of(reviews[at][1]) is not None]
        self.judged = [reviews[at] for at in with_label[: size.judged]]
        self.labelled = [reviews[at] for at in with_label[size.judged : size.judged + size.labelled]]
        kept = set(with_label[: size.judged])
        learned = [reviews[at][0] for at in order if int(at) not in kept]
        counts = Counter(sign for review in learned for sign in set(review))
        frequent = sorted(sign for sign, count in counts.items() if count >= RAREST)
        # The sign before them is any other.
        self.ids = {sign: number for number, sign in enumerate(frequent, FIRST_SIGN + 1)}
        data = folder / "data"

        def write_data() -> dict[str, int]:
            held_out = size.learning.validation_rows
            rows = [self.padded(review) for review in learned]
            train = [rows[held_out + row % (len(rows) - held_out)] for row in range(size.learning.rows)]
            splits = {
                split: (np.array(some), np.ones(len(some), np.int64))
                for split, some in (("train", train), ("validation", rows[:held_out]))
            }
            write_rows(data, splits, self.vocab_size)
            return {"learned": len(rows) - held_out}

        self.reviews = once(folder / "data.json", write_data)
        self.twins = Twins(folder, data, self.vocab_size, size.row_length, size.learning, OBJECTIVES)

    @property
    def vocab_size(self) -> int:
        return FIRST_SIGN + 1 + len(self.ids)

    def row(self, review: str) -> list[int]:
        """A review as it is judged: cut to the length of a row, which begins and ends with an end of text."""
        return [EOS, *(self.ids.get(sign, FIRST_SIGN) for sign in review[: self.size.row_length - 2]), EOS]

    def padded(self, review: str) -> list[int]:
        row = self.row(review)
        return row + [EOS] * (self.size.row_length - len(row))

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """{"accuracy": the share of reviews that are judged rightly, …}."""

        def measure(network: Transformer, result: TrainResult | None) -> dict[str, Any]:
            config = self.size.finetuning
            model = Classifier(network.float().requires_grad_(True), 2, config.pooling, seed)
            model.to(next(network.parameters()).device)
            labels = [float(label_of(rating) or 0) for _, rating in self.labelled]
            losses = finetune(model, [self.row(review) for review, _ in self.labelled], labels, config, seed)
            found = answers(model, [self.row(review) for review, _ in self.judged], config)
            right = [
                answer == label_of(rating) for answer, (_, rating) in zip(found, self.judged, strict=True)
            ]
            return {"accuracy": sum(right) / len(right), "last_loss": losses[-1]}

        if name == UNTRAINED:
            network = Transformer(self.twins.network("LLaDA"))
            network.init_weights(seed)

            def make() -> dict[str, Any]:
                begun = time.process_time()
                measured = measure(network, None)
                return {**measured, "cpu_s": time.process_time() - begun, "commit": machine()["commit"]}

            return once(self.twins.folder / "runs" / f"untrained-{seed}.json", make)
        return self.twins.run(name, seed, measure)


def summarise(experiment: Experiment, before: dict[str, Any]) -> dict[str, Any]:
    """All that is known, as the result has it."""
    rows, done = [], []
    for name in (*OBJECTIVES, UNTRAINED):
        runs = [experiment.run(name, seed) for seed in experiment.size.learning.seeds]
        done += runs
        rows.append(
            {
                "network": name,
                "accuracy": [run["accuracy"] for run in runs],
                "loss": [run.get("validation_loss") for run in runs],
            }
        )
    labels = [label_of(rating) for _, rating in experiment.judged]
    return {
        **head_of_report(before, done),
        "settings": experiment.settings,
        "parameters": experiment.twins.network("LLaDA").num_parameters,
        "tokens": done[0]["tokens"],
        "reviews": {**experiment.reviews, "labelled": len(experiment.labelled), "judged": len(labels)},
        "majority": Counter(labels).most_common(1)[0][1] / len(labels),
        "rows": rows,
    }


def table(report: dict[str, Any]) -> str:
    """Markdown: what is judged rightly, in percent."""
    lines = ["| network | accuracy, % |", "|---|---|"]
    for row in report["rows"]:
        mean, error = mean_and_error(row["accuracy"])
        lines.append(f"| {row['network']} | {100 * mean:.1f} ± {100 * error:.1f} |")
    lines.append(f"| always the commoner label | {100 * report['majority']:.1f} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], target: Path) -> None:
    """The accuracies with their seeds, and the same above the commoner label's."""
    figure, axes = draw_figure()
    names = [row["network"] for row in report["rows"]]
    for axis, base in zip(axes, (0.0, report["majority"]), strict=True):
        for place, row in enumerate(report["rows"]):
            gained = [100 * (share - base) for share in row["accuracy"]]
            axis.bar(place, np.mean(gained), 0.6, color="tab:blue", alpha=0.6)
            axis.scatter([place] * len(gained), gained, color="black", s=10, zorder=3)
        axis.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names])
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("reviews judged rightly, %")
    axes[1].set_ylabel("more than by the commoner label, %")
    save_figure(figure, target)


def main(words: Sequence[str] | None = None) -> None:
    arguments = command_line(__doc__, text="nsmc_20k.jsonl.gz").parse_args(words)
    before = machine()
    size = QUICK if arguments.quick else SCALE if arguments.scale else FULL
    experiment = Experiment(arguments.text, arguments.output, size)
    for seed in size.learning.seeds:
        for name in (*OBJECTIVES, UNTRAINED):
            experiment.run(name, seed)
    publish(summarise(experiment, before), "understanding", arguments, table, plot)


if __name__ == "__main__":
    main()
