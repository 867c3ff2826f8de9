"""The command `train-classifier`: labelled documents to a quality classifier, a folder that the filter `classifier` of
`llada prepare` takes (--read.rules.classifier.model)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from llada.data.filters.classifier import ClassifierConfig, read_labels, train_classifier
from pipelines.stage.command import Flat, parse, run_command


@dataclass(frozen=True)
class TrainClassifierArgs:
    """Labelled documents to a quality classifier, for the filter `classifier`."""

    input: tuple[str, ...]
    """Files of {"text", "label"}, label 1 for what is to be kept and 0 for what is not."""
    output: str
    """Folder to write."""
    text_field: str = "text"
    label_field: str = "label"
    config: Annotated[ClassifierConfig, Flat] = field(default_factory=ClassifierConfig)


def main(argv: Sequence[str]) -> None:
    """`llada train-classifier …`"""
    args = parse_words(argv)
    labels = read_labels(args.input, args.text_field, args.label_field)
    classifier, figures = train_classifier(labels, args.config)
    classifier.save(args.output)
    print(f"{args.output}: " + ", ".join(f"{name} {value:,.3f}" for name, value in figures.items()))


def parse_words(argv: Sequence[str]) -> TrainClassifierArgs:
    """The arguments."""
    return parse(TrainClassifierArgs, argv, "train-classifier")


if __name__ == "__main__":
    run_command("train-classifier")
