"""Whether a network that has learned to write a language understands it: the sentiment of Korean film reviews (NSMC).

    python tests/experiments/understanding.py --text FOLDER --output FOLDER [--results FOLDER] [--image FILE] [--quick | --scale]

Twins (twins.py) learn the reviews of FOLDER/nsmc_20k.jsonl.gz without their ratings: LLaDA, BERT with its 15 % of masks, and an
autoregressive network. Then each gets a head over the mean of its last layer, and is fine-tuned with it on labelled reviews, as
`llada evaluate --tasks understanding` does; beside them stand a network that has learned nothing before, and what a judge can do
without a network: a logistic regression on how often each character, and each pair of them, stands in the same rows. As in NSMC a
rating of at most 4 is negative, of at least 9 positive, those between have no label, and there are as many negative reviews as
positive ones. A token is a character.

The twins' rates are chosen by the loss on reviews that are not learned; how they, and the untrained network, are fine-tuned, and
the regression's strength, by the accuracy on labelled reviews of the choice. Those and the judged ones are among nothing that is
learned.

Each result is a file in --output when it is there; the same command goes on where it was. At the end it writes understanding.json
into --results, the table into --output/understanding.md and the figure into --image. --quick is to see that it runs, in seconds,
--scale for a GPU; both write into --output.
"""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from twins import (
    EOS,
    FIRST_SIGN,
    RATE_SEED,
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
    slug,
    source_of,
    write_rows,
)

from llada.diffusion.objective import ObjectiveConfig
from llada.model.predict import device_of
from llada.model.transformer import Transformer
from llada.training.trainer import TrainResult
from llada.understanding.classifier import Classifier
from llada.understanding.config import UnderstandingConfig
from llada.understanding.finetune import answers, finetune

OBJECTIVES = {**TWINS, "BERT 15 %": ObjectiveConfig(schedule="bert", document_mask=False)}
UNTRAINED = "nothing learned before"
BAG = "characters and pairs, counted"
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the regression: the inverse of its penalty
RAREST = 5  # characters that stand in fewer reviews are one sign


@dataclass(frozen=True)
class Size:
    """What an experiment costs."""

    learning: Learning
    finetunings: tuple[UnderstandingConfig, ...]
    """To choose from, for each kind of network."""
    labelled: int
    """Reviews to fine-tune on; as of those of the choice and the judged ones, half are negative."""
    of_choice: int
    judged: int
    row_length: int = 48


FULL = Size(
    Learning(num_steps=1600, batch_rows=32, rates=(0.01, 0.02), d_model=64, num_layers=2),
    (
        UnderstandingConfig(num_epochs=2, lr=1e-3),
        UnderstandingConfig(num_epochs=2, lr=3e-3),
        UnderstandingConfig(num_epochs=2, lr=3e-3, weight_decay=1.0),
        UnderstandingConfig(num_epochs=4, lr=3e-4),
    ),
    labelled=2000,
    of_choice=800,
    judged=2000,
)
QUICK = Size(
    Learning(num_steps=4, batch_rows=4, rates=(0.01,), d_model=32, num_layers=1, seeds=(0, 1), validation_rows=4),
    (UnderstandingConfig(num_epochs=1, lr=1e-3), UnderstandingConfig(num_epochs=1, lr=3e-3)),
    labelled=16,
    of_choice=8,
    judged=16,
    row_length=16,
)  # fmt: skip
SCALE = Size(
    Learning(
        num_steps=6000, batch_rows=256, rates=(0.003, 0.01), d_model=512, num_layers=8, precision="auto"
    ),
    tuple(UnderstandingConfig(num_epochs=4, lr=lr) for lr in (3e-5, 1e-4, 3e-4)),
    labelled=4000,
    of_choice=800,
    judged=2000,
)


def label_of(rating: int) -> int | None:
    """0 of a negative review, 1 of a positive one."""
    return 0 if rating <= 4 else 1 if rating >= 9 else None


def read_reviews(file: Path) -> list[tuple[str, int]]:
    """(text, rating) of the reviews, each text once."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return list({row["text"]: int(row["rating"]) for row in rows if row["text"].strip()}.items())


def balanced(
    reviews: Sequence[tuple[str, int]], sizes: Sequence[int], file: Path
) -> list[list[tuple[str, int]]]:
    """Of each size so many reviews with a label, half of them negative, and none twice. SystemExit where there are too few."""
    parts: list[list[tuple[str, int]]] = [[] for _ in sizes]
    for label, kind in enumerate(("negative", "positive")):
        found = iter(review for review in reviews if label_of(review[1]) == label)
        for part, size in zip(parts, sizes, strict=True):
            some = list(itertools.islice(found, size // 2))
            if len(some) < size // 2:
                raise SystemExit(f"{file} has too few {kind} reviews: {sum(sizes) // 2} are wanted")
            part += some
    return parts


class Experiment:
    """The twins and the reviews; what is done lies in `folder`."""

    def __init__(self, text: Path, folder: Path, size: Size) -> None:
        self.size = size
        self.settings = keep_settings(folder, {**asdict(size), "text": source_of(text)})
        reviews = read_reviews(text)
        reviews = [reviews[at] for at in np.random.default_rng(0).permutation(len(reviews))]
        self.judged, self.of_choice, self.labelled = balanced(
            reviews, (size.judged, size.of_choice, size.labelled), text
        )
        kept = {review for review, _ in self.judged + self.of_choice}
        learned = [review for review, _ in reviews if review not in kept]
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
            chosen = self.choose_finetuning(name, network)
            config = self.size.finetunings[chosen["best"]]
            return {"accuracy": self.accuracy(network, config, seed, self.judged), "finetuning": chosen}

        if name == UNTRAINED:
            network = Transformer(self.twins.network("LLaDA"))
            network.init_weights(seed)

            def make() -> dict[str, Any]:
                begun = time.process_time()
                measured = measure(network, None)
                return {**measured, "cpu_s": time.process_time() - begun, "commit": machine()["commit"]}

            return once(self.twins.folder / "runs" / f"untrained-{seed}.json", make)
        return self.twins.run(name, seed, measure)

    def choose_finetuning(self, name: str, network: Transformer) -> dict[str, Any]:
        """{"best": number of the best one, "accuracies": of each, on the reviews of the choice}, by the first network of this name."""

        def make() -> dict[str, Any]:
            configs = self.size.finetunings
            found = [self.accuracy(network, config, RATE_SEED, self.of_choice) for config in configs]
            return {"best": int(np.argmax(found)), "accuracies": found}

        return once(self.twins.folder / "finetunings" / f"{slug(name)}.json", make)

    def accuracy(
        self, network: Transformer, config: UnderstandingConfig, seed: int, asked: Sequence[tuple[str, int]]
    ) -> float:
        """The share of these reviews that a copy of the network, fine-tuned, judges rightly."""
        own = copy.deepcopy(network).float().requires_grad_(True)
        model = Classifier(own, 2, config.pooling, seed).to(device_of(network))
        rows, labels = self.rows_and_labels(self.labelled)
        finetune(model, rows, labels.tolist(), config, seed)
        rows, labels = self.rows_and_labels(asked)
        return float((np.array(answers(model, rows, config)) == labels).mean())

    def rows_and_labels(self, reviews: Sequence[tuple[str, int]]) -> tuple[list[list[int]], np.ndarray]:
        labels = np.array([label_of(rating) for _, rating in reviews], dtype=np.float64)
        return [self.row(review) for review, _ in reviews], labels

    def count_characters(self) -> dict[str, Any]:
        """The judge without a network: {"accuracy": …, "strength": the best one, "accuracies": of each, on the reviews of the
        choice, …}."""

        def make() -> dict[str, Any]:
            begun = time.process_time()
            counter = CountVectorizer(
                analyzer=lambda row: [*((sign,) for sign in row), *itertools.pairwise(row)]
            )
            rows, labels = self.rows_and_labels(self.labelled)
            counts = counter.fit_transform(rows)

            def share(regression: LogisticRegression, asked: Sequence[tuple[str, int]]) -> float:
                rows, labels = self.rows_and_labels(asked)
                return float(regression.score(counter.transform(rows), labels))

            regressions = [
                LogisticRegression(C=strength, max_iter=1000).fit(counts, labels) for strength in STRENGTHS
            ]
            found = [share(regression, self.of_choice) for regression in regressions]
            best = int(np.argmax(found))
            return {
                "accuracy": share(regressions[best], self.judged),
                "strength": STRENGTHS[best],
                "accuracies": found,
                "cpu_s": time.process_time() - begun,
                "commit": machine()["commit"],
            }

        return once(self.twins.folder / "characters.json", make)


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
                "finetuning": runs[0]["finetuning"],
            }
        )
    counted = experiment.count_characters()
    done.append(counted)
    rows.append({"network": BAG, "accuracy": [counted["accuracy"]], "strength": counted["strength"]})
    labels = [label_of(rating) for _, rating in experiment.judged]
    return {
        **head_of_report(before, done),
        "settings": experiment.settings,
        "parameters": experiment.twins.network("LLaDA").num_parameters,
        "tokens": done[0]["tokens"],
        "reviews": {
            **experiment.reviews,
            "labelled": len(experiment.labelled),
            "of_choice": len(experiment.of_choice),
            "judged": len(labels),
        },
        "majority": Counter(labels).most_common(1)[0][1] / len(labels),
        "rows": rows,
    }


def over_untrained(report: dict[str, Any], row: dict[str, Any]) -> list[float]:
    """Of a network, by seed: how much larger its accuracy is than that of the one that learned nothing before, in points."""
    (base,) = (row["accuracy"] for row in report["rows"] if row["network"] == UNTRAINED)
    return [100 * (a - b) for a, b in zip(row["accuracy"], base, strict=True)]


def table(report: dict[str, Any]) -> str:
    """Markdown: what is judged rightly, in percent; a judge that draws nothing at random has one figure, without an error."""
    lines = [f"| network | accuracy, % | − {UNTRAINED} |", "|---|---|---|"]
    for row in report["rows"]:
        right, more = [100 * share for share in row["accuracy"]], "–"
        if row["network"] in OBJECTIVES:
            more = "{:.1f} ± {:.1f}".format(*mean_and_error(over_untrained(report, row)))
        figure = "{:.1f} ± {:.1f}".format(*mean_and_error(right)) if len(right) > 1 else f"{right[0]:.1f}"
        lines.append(f"| {row['network']} | {figure} | {more} |")
    lines.append(f"| always the commoner label | {100 * report['majority']:.1f} | – |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], target: Path) -> None:
    """The accuracies with their seeds, and by how much the networks that learned before are above the one that did not."""
    figure, (left, right) = draw_figure()
    shares = {row["network"]: [100 * share for share in row["accuracy"]] for row in report["rows"]}
    gains = {
        name: over_untrained(report, row) for row in report["rows"] if (name := row["network"]) in OBJECTIVES
    }
    for axis, figures in ((left, shares), (right, gains)):
        for place, values in enumerate(figures.values()):
            axis.bar(place, np.mean(values), 0.6, color="tab:blue", alpha=0.6)
            axis.scatter([place] * len(values), values, color="black", s=10, zorder=3)
        axis.set_xticks(range(len(figures)), [fill(name, 10, break_long_words=False) for name in figures])
        axis.grid(axis="y", alpha=0.3)
    left.axhline(100 * report["majority"], color="grey", linestyle="--", label="always the commoner label")
    left.legend(loc="lower right")
    left.set_ylabel("reviews judged rightly, %")
    right.axhline(0, color="grey", linewidth=1)
    right.set_ylabel(f"points above {UNTRAINED}")
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
