"""A learned quality classifier: is a text like the ones labelled 1 or like those labelled 0?

Logistic regression on hashed word 1- and 2-grams, in the spirit of fastText (arXiv 1607.01759): a text is the vector of
its n-gram counts, of length 1, and its score the probability of label 1. Words are those of the filters, punctuation
included, a character each in scripts without spaces. On 181 web pages with human labels the cross-validated AUC is
0.95 (by length alone 0.86).

A classifier is a self-contained folder: config.json (settings and held-out figures) + weights.safetensors.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from llada.data.batching import batches
from llada.data.document import Document, text_problem
from llada.data.filters.filter import Filter, Filtered, Verdict
from llada.data.filters.view import TextView
from llada.data.left_out import FilesLeftOut, added, summary
from llada.data.outcomes import Rejects
from llada.data.read.formats import read_records
from llada.data.read.listing import list_inputs
from llada.data.read.parts import Part
from llada.errors import UserError
from llada.files import join, read_bytes, write_bytes
from llada.mixing import mix64
from llada.settings import check_limits, limited
from llada.store_errors import StoreError

_log = logging.getLogger(__name__)

FORMAT = "llada-quality-classifier-1"
_WORDS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained. Same examples in the same order and same settings, same weights."""

    hash_bits: int = limited(20, low=8, high=28)
    """n-grams share 2^hash_bits weights, of 4 bytes."""
    epochs: int = limited(10, low=1, high=10_000)
    """Passes over the examples."""
    learning_rate: float = limited(4.0, above=0)
    """Of the first step; it falls linearly to 0. Texts have length 1, so it is large."""
    folds: int = limited(5, low=2, high=1000)
    """The held-out figures come from this many classifiers, each trained without one part of the examples."""
    seed: int = 0
    """Orders the examples and divides them into folds."""

    def __post_init__(self) -> None:
        check_limits(self, "classifier")


@dataclass(frozen=True)
class ClassifierFilter(Filter):
    """A learned classifier and the score that a document must reach."""

    model: str | None = None
    """URL of the classifier's folder."""
    threshold: float = 0.5
    """Probability that a text is like the ones labelled 1."""

    label: ClassVar = "Classifier"
    reasons: ClassVar = MappingProxyType({"classifier.low_score": "its score is below `threshold`"})

    def __call__(self, document: Document, view: TextView) -> Filtered:
        assert self.model is not None  # see `problem`
        score = float(_load(self.model).score([view])[0])
        refused = Verdict("classifier.low_score", score, self.threshold) if score < self.threshold else None
        return Filtered(document, refused)

    def problem(self) -> str | None:
        is_given = self.model is not None
        return (
            None if is_given else "the filter classifier needs rules.classifier.model, a classifier's folder"
        )

    def files(self) -> list[str]:
        return [] if self.model is None else [join(self.model, "weights.safetensors")]


class QualityClassifier:
    """Scores texts. `weights` float32 (2^hash_bits,), `figures` as `train_classifier` returns them."""

    def __init__(
        self, config: ClassifierConfig, weights: np.ndarray, bias: float, figures: dict[str, float]
    ) -> None:
        self.config, self.weights, self.bias, self.figures = config, weights, bias, figures

    def score(self, texts: Iterable[str | TextView]) -> np.ndarray:
        """The probability of label 1 of each text, float64 (texts,). A TextView's words are not split again."""
        logits: list[np.ndarray] = [np.empty(0)]
        views = (TextView(text) if isinstance(text, str) else text for text in texts)
        for group in batches(views, lambda view: len(view.words), _WORDS_AT_ONCE):
            document, bucket, value = _features(group, self.config.hash_bits)
            parts = self.weights[bucket] * value
            logits.append(np.bincount(document, weights=parts, minlength=len(group)) + self.bias)
        return _sigmoid(np.concatenate(logits))

    def save(self, folder: str) -> None:
        """Write the folder, config.json last."""
        arrays = {"weights": self.weights, "bias": np.array([self.bias])}
        write_bytes(join(folder, "weights.safetensors"), save(arrays))
        described = {"format": FORMAT, **asdict(self.config), "figures": self.figures}
        write_bytes(join(folder, "config.json"), json.dumps(described, indent=1).encode())

    @classmethod
    def load(cls, folder: str) -> QualityClassifier:
        """Read what `save` wrote. Raises UserError naming a folder that is missing, foreign or damaged."""
        try:
            described = json.loads(read_bytes(join(folder, "config.json")))
            if described.pop("format") != FORMAT:
                raise ValueError
            figures = described.pop("figures")
            config = ClassifierConfig(**described)
            arrays = load(read_bytes(join(folder, "weights.safetensors")))
            if arrays["weights"].shape != (1 << config.hash_bits,):
                raise ValueError
            return cls(config, arrays["weights"], float(arrays["bias"][0]), figures)
        except FileNotFoundError as error:
            raise UserError(f"no quality classifier in {folder}: {error}; train one") from None
        except StoreError:
            raise
        except (SafetensorError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{folder} is no {FORMAT} folder or is damaged; train the classifier again"
            ) from None


_load = functools.cache(QualityClassifier.load)


def read_labels(
    urls: Sequence[str], text_field: str = "text", label_field: str = "label"
) -> Iterator[tuple[str, int]]:
    """(text, label) of each row of labelled files; a label is 1 (keep) or 0, or true or false.

    Raises UserError naming the first row that cannot be read, has no text or another label.
    """
    left_out: FilesLeftOut = {}
    without_records: FilesLeftOut = {}
    for file in list_inputs(urls, left_out=left_out):
        rejects = Rejects()
        for record in read_records(Part(file, file.size or 0), rejects):
            text, label = (record.fields.get(name) for name in (text_field, label_field))
            place = f"labelled file {file.url}:{record.line}"
            if not isinstance(text, str) or text_problem(text):
                raise UserError(f"{place}: field {text_field!r} holds no text; mend the row or leave it out")
            if not isinstance(label, int) or label not in (0, 1):
                raise UserError(
                    f"{place}: {label_field!r} is {label!r}; give 1 for what to keep and 0 for the rest"
                )
            yield text, int(label)
        if rejects.counts:
            raise UserError(
                f"labelled file {file.url}: cannot read {rejects.counts.total()} rows "
                f"({', '.join(rejects.counts)}); mend the file or leave it out"
            )
        without_records = added(without_records, rejects.left_out)
    if left_out := added(left_out, without_records):
        _log.warning("left out of the labelled files: %s", summary(left_out))


def train_classifier(
    examples: Iterable[tuple[str, int]], config: ClassifierConfig | None = None
) -> tuple[QualityClassifier, dict[str, float]]:
    """(classifier trained on all examples, held-out figures: examples, positives, auc, accuracy).

    The figures are those of `config.folds` other classifiers on the examples that each did not see; repeated texts
    make them too good. Thousands of documents take seconds; all features are in memory, about 10 KB a document.
    Raises UserError when a label has fewer examples than there are folds.
    """
    config = config or ClassifierConfig()
    features: list[tuple[np.ndarray, np.ndarray]] = []
    labels: list[int] = []
    for text, label in examples:
        _, bucket, value = _features([TextView(text)], config.hash_bits)
        features.append((bucket, value))
        labels.append(label)
    truth = np.array(labels, dtype=np.float64)
    positives = int(truth.sum())
    if min(positives, len(truth) - positives) < config.folds:
        raise UserError(
            f"{positives} examples have label 1 and {len(truth) - positives} label 0; {config.folds} folds need "
            f"{config.folds} of each: label more documents"
        )
    order = np.random.default_rng(config.seed).permutation(len(truth))
    held_out = np.empty(len(truth))
    for fold in range(config.folds):
        seen = np.delete(order, np.s_[fold :: config.folds])
        weights, bias = _fit(features, truth, seen, config)
        for example in order[fold :: config.folds]:
            bucket, value = features[example]
            held_out[example] = weights[bucket] @ value + bias
    weights, bias = _fit(features, truth, order, config)
    figures = {
        "examples": len(truth),
        "positives": positives,
        "auc": area_under_curve(truth, held_out),
        "accuracy": float(((held_out > 0) == (truth == 1)).mean()),
    }
    return QualityClassifier(config, weights.astype(np.float32), bias, figures), figures


def area_under_curve(truth: np.ndarray, scores: np.ndarray) -> float:
    """The probability that a positive scores above a negative, ties counting half; truth (n,) is 0 or 1."""
    _, rank, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(count) - (count - 1) / 2)[rank]
    positives = truth.sum()
    above = mean_rank[truth == 1].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(truth) - positives)))


def _fit(
    features: Sequence[tuple[np.ndarray, np.ndarray]],
    truth: np.ndarray,
    seen: np.ndarray,
    config: ClassifierConfig,
) -> tuple[np.ndarray, float]:
    """(weights float64 (2^hash_bits,), bias) by stochastic gradient descent on the log loss of the examples `seen`."""
    weights, bias = np.zeros(1 << config.hash_bits), 0.0
    rng = np.random.default_rng([config.seed, 1])
    steps = config.epochs * len(seen)
    for step, example in enumerate(np.concatenate([rng.permutation(seen) for _ in range(config.epochs)])):
        bucket, value = features[example]
        error = truth[example] - _sigmoid(weights[bucket] @ value + bias)
        rate = config.learning_rate * (1 - step / steps)
        weights[bucket] += rate * error * value  # buckets of one text are distinct
        bias += 0.1 * rate * error  # an n-gram's value is about this large
    return weights, float(bias)


def _features(views: Sequence[TextView], hash_bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, bucket, value) of every n-gram bucket that occurs, int64, int64, float64 (n,), by document.

    Values are counts, divided by the length of the document's count vector.
    """
    words = [view.words["key"] for view in views]
    of_word = np.repeat(np.arange(len(words), dtype=np.uint64), [len(w) for w in words])
    keys = mix64(np.concatenate([np.empty(0, np.uint64), *words]))
    together = of_word[1:] == of_word[:-1]
    pairs = mix64(keys[:-1] * np.uint64(3) + keys[1:])[together]
    documents = np.concatenate([of_word, of_word[1:][together]])
    bits = np.uint64(hash_bits)
    buckets = np.concatenate([keys, pairs]) >> (np.uint64(64) - bits)
    cells, counts = np.unique((documents << bits) | buckets, return_counts=True)
    document, bucket = (cells >> bits).astype(np.int64), (cells & ((np.uint64(1) << bits) - np.uint64(1)))
    norms = np.sqrt(np.bincount(document, weights=counts.astype(np.float64) ** 2, minlength=len(words)))
    return document, bucket.astype(np.int64), counts / norms[document]


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * logits)  # does not overflow
