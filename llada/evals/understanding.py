"""The task "understanding": the checkpoint with a head, fine-tuned on labelled rows, judges others.

Each fine-tuning, of a seed, is a block of work: several run side by side, and one that is done is not done again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

from llada.errors import UserError, hint
from llada.evals.evaluation import Block, EvaluateConfig, Evaluation, Figures, OpenModel
from llada.evals.local_rows import field_of, is_finite, read_rows
from llada.files import join, write_bytes
from llada.model.hf import read_config
from llada.sampling.text import checkpoint_tokenizer
from llada.settings import shorten
from llada.understanding.classifier import Classifier, encode_rows
from llada.understanding.config import UnderstandingConfig
from llada.understanding.finetune import answers, finetune
from llada.understanding.scores import score_answers

UNDERSTANDING_FILE = "understanding.jsonl"
Label = str | int | float


class Labelled(TypedDict):
    """Texts with their labels, all of one length."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[Label]


class Finetuning(Block):
    """One fine-tuning."""

    seed: int


class Judgements(TypedDict):
    """What it came to."""

    answers: list[float]
    """Of each test row: the number of a class, or a score."""
    last_loss: float
    """Of the last step."""


def needed_rows(config: EvaluateConfig) -> tuple[str, str]:
    """The files to learn from and to be judged by. Raises UserError where one is not given."""
    train, test = config.understanding.train, config.understanding.test
    if train is None or test is None:
        raise UserError(
            "the task understanding needs --understanding.train and --understanding.test, files of labelled rows"
        )
    return train, test


def measure_understanding(evaluation: Evaluation) -> Figures:
    """The figures of `score_answers`, each as "understanding/…", with "majority", what the commonest class of the training rows
    would have, "train_rows", "test_rows", "texts_cut". The answers are lines of understanding.jsonl.

    Raises UserError: no rows, no labels or one that training does not know, a checkpoint without a tokenizer.
    """
    config = evaluation.config.understanding
    files = needed_rows(evaluation.config)
    folder = evaluation.fetch_model()
    network, _ = read_config(folder)
    tokenizer = checkpoint_tokenizer(folder, network)
    if tokenizer is None:
        raise UserError(f"{evaluation.model} has no tokenizer, which the task understanding needs")
    length = config.max_length or network.max_length
    if length > network.max_length:
        raise UserError(
            f"understanding.max_length {length} is longer than the context of {evaluation.model}, {network.max_length}"
        )
    if network.causal and config.pooling == "first":
        raise UserError(
            f'{evaluation.model} is autoregressive: at its first position it has seen nothing of the text; take pooling "last" or "mean"'
        )
    training, test = (read_labelled(file, config) for file in files)
    classes = class_names(training["labels"], config)
    encoded = [
        encode_rows(tokenizer, part["texts"], part["pairs"], config.pooling, length)
        for part in (training, test)
    ]
    wanted = [
        targets(part["labels"], classes, file) for part, file in zip((training, test), files, strict=True)
    ]
    build = partial(
        Finetuner, evaluation.open_model, config, len(classes), encoded[0].rows, wanted[0], encoded[1].rows
    )
    blocks: list[Finetuning] = [
        {"name": f"seed-{number}", "seed": evaluation.config.seed + number} for number in range(config.seeds)
    ]
    found = list(evaluation.map_blocks(build, blocks, folder="understanding"))
    scores = score_answers(wanted[1], [part["answers"] for part in found], config.target, len(classes))
    _write_answers(evaluation.output, test, classes, found)
    figures: Figures = {**scores, "train_rows": len(wanted[0]), "test_rows": len(wanted[1])}
    if classes:
        commonest = Counter(wanted[0]).most_common(1)[0][0]
        figures["majority"] = sum(label == commonest for label in wanted[1]) / len(wanted[1])
    figures["texts_cut"] = sum(part.num_cut for part in encoded)
    figures["last_loss"] = sum(part["last_loss"] for part in found) / len(found)
    return {f"understanding/{name}": value for name, value in figures.items()}


@dataclass(frozen=True)
class Finetuner:
    """Fine-tunes the checkpoint, and lets it judge the test rows."""

    open_model: OpenModel
    config: UnderstandingConfig
    num_classes: int
    rows: list[list[int]]
    labels: list[float]
    test_rows: list[list[int]]

    def __call__(self, block: Finetuning) -> Judgements:
        # Anew for each seed: the one before has moved its weights.
        network, _ = self.open_model(fast=False)
        network.float().requires_grad_(True)
        model = Classifier(network, max(1, self.num_classes), self.config.pooling, block["seed"])
        model.to(next(network.parameters()).device)
        losses = finetune(model, self.rows, self.labels, self.config, block["seed"])
        return {"answers": answers(model, self.test_rows, self.config), "last_loss": losses[-1]}


def read_labelled(url: str, config: UnderstandingConfig) -> Labelled:
    """The rows of a file. Raises UserError naming the file, and the row that has no text or no label."""
    rows = read_rows(url)
    places = [f"{url}, row {number}" for number in range(1, len(rows) + 1)]
    kinds = (int, float) if config.target == "score" else (str, int)

    def column(name: str, kind: type | tuple[type, ...]) -> list[Label]:
        return [field_of(row, name, kind, place) for row, place in zip(rows, places, strict=True)]

    return {
        "texts": [str(text) for text in column(config.text_field, str)],
        "pairs": None
        if config.pair_field is None
        else [str(text) for text in column(config.pair_field, str)],
        "labels": column(config.label_field, kinds),
    }


def class_names(labels: Sequence[Label], config: UnderstandingConfig) -> list[Label]:
    """The classes in their order, numbers before names; none where labels are scores. Raises UserError for a single one, and for a
    label that is a number in one row and a text in another."""
    if config.target == "score":
        return []
    classes = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
    if len(classes) < 2:
        raise UserError(
            f"{config.train}: all rows have the label {shorten(classes[0])}, of which nothing can be learned"
        )
    if len(spelled := set(map(str, classes))) < len(classes):
        both = next(label for label in spelled if sum(str(one) == label for one in classes) > 1)
        raise UserError(
            f"{config.train}: some rows have the number {both} as their label, some the text {both!r}; write all of them alike"
        )
    return classes


def targets(labels: Sequence[Label], classes: Sequence[Label], url: str) -> list[float]:
    """Numbers of classes, or the scores themselves. Raises UserError for a label that is none of the classes, and for a score
    that is no number."""
    if not classes:
        for row, label in enumerate(labels, start=1):
            if isinstance(label, str) or not is_finite(label):
                raise UserError(
                    f"{url}, row {row}: the score is {label!s:.40}, which is no number to reckon with"
                )
        return [float(label) for label in labels]
    numbers = {label: float(number) for number, label in enumerate(classes)}
    for row, label in enumerate(labels, start=1):
        if label not in numbers:
            raise UserError(
                f"{url}, row {row}: no training row has the label {shorten(label)}; {hint(label, (str(each)[:80] for each in classes))}"
            )
    return [numbers[label] for label in labels]


def _write_answers(
    output: str, test: Labelled, classes: Sequence[Label], found: Sequence[Judgements]
) -> None:
    lines = []
    for number, (text, label) in enumerate(zip(test["texts"], test["labels"], strict=True)):
        given = [part["answers"][number] for part in found]
        named = [classes[int(answer)] for answer in given] if classes else given
        lines.append(json.dumps({"text": text, "label": label, "answers": named}, ensure_ascii=False) + "\n")
    write_bytes(join(output, UNDERSTANDING_FILE), "".join(lines).encode())
