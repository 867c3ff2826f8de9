"""What became of the documents of a work unit, and the sum of many such reports.

    Report   documents by what ended them, bytes, samples, CPU time: added up over units, stored as JSON
    Rejects  records that could not become a document: counted by reason, the first ones kept as examples
Counts add up; samples are kept by the hash of their text, so that the same ones stay whatever the order of adding.
"""

from __future__ import annotations

import copy
import hashlib
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, TypeVar

from llada.data.document import Document

KEPT = "kept"
SAMPLES_PER_OUTCOME = 4
SAMPLE_CHARS = 600
_MAX_NAMED = 1000  # files and matches that a report lists by name; the counts go on
_EXCERPT_CHARS = 200
_MAX_EXAMPLES = 200

T = TypeVar("T")
Counts = dict[str, int]
Measure = float | int | str | None
"""A value that a rule looked at, or its limit."""


class Sample(TypedDict):
    """The beginning of one document that ended in some way."""

    hash: str
    """Of the whole text: the samples with the smallest ones stay."""
    text: str
    value: Measure
    limit: Measure
    place: str
    language: str


class EvaluationMatch(TypedDict):
    """A document that holds a row of an evaluation set."""

    place: str
    """Of the document."""
    file: str
    """Of the evaluation set, with the row's line."""
    line: int
    words: str
    """That stand in both."""


class RejectedRecord(TypedDict):
    """A record that could not be used: why, where, and its beginning."""

    reason: str
    source: str
    line: int
    text: str


# --- Sums of reports: each field of a report says how it is added up ---------------------------------------------------


def _added(total: Any, more: Any) -> Any:
    """The sum of two figures of one form: numbers, or lists or dictionaries of such."""
    if isinstance(more, dict):
        sums = dict(total)
        for key, value in more.items():
            sums[key] = _added(sums[key], value) if key in sums else copy.deepcopy(value)
        return sums
    if isinstance(more, list):
        return [_added(one, other) for one, other in zip(total, more, strict=True)]
    return total + more


def _common(total: str, more: str) -> str:
    return total if total == more else ""


def _smallest(total: dict[str, list[Sample]], more: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    """By outcome, the samples with the smallest hashes."""
    samples = dict(total)
    for outcome, others in more.items():
        ranked = sorted([*samples.get(outcome, []), *others], key=lambda sample: sample["hash"])
        samples[outcome] = ranked[:SAMPLES_PER_OUTCOME]
    return samples


def _first(total: list[T], more: list[T]) -> list[T]:
    return [*total, *more][:_MAX_NAMED]


def _first_of_both(total: dict[str, str], more: dict[str, str]) -> dict[str, str]:
    return dict([*total.items(), *more.items()][:_MAX_NAMED])


def _merged(how: Callable[[Any, Any], Any], form: Callable[[], Any]) -> Any:
    """A field, empty as form() is, of which how(total, more) is the sum."""
    return field(default_factory=form, metadata={"merge": how})


@dataclass
class Report:
    """Documents, bytes and files of one unit or of many."""

    source: str = _merged(_common, str)
    """Empty when there are several."""
    units: int = _merged(_added, int)
    input_bytes: int = _merged(_added, int)
    outcomes: dict[str, dict[str, list[int]]] = _merged(_added, dict)
    """{language: {outcome: [documents, bytes of UTF-8]}}; an outcome is "kept" or the rule that refused."""
    rejected: Counts = _merged(_added, dict)
    """Records that could not be read, by reason."""
    skipped: Counts = _merged(_added, dict)
    """Sound records that hold no document, by reason."""
    edits: Counts = _merged(_added, dict)
    """Of kept documents: addresses replaced, lines and examples removed."""
    histograms: dict[str, Counts] = _merged(_added, dict)
    """{"characters" | "tokens" of the kept: {k: documents with 2^k <= length < 2^(k+1)}}"""
    samples: dict[str, list[Sample]] = _merged(_smallest, dict)
    """By outcome."""
    matches: list[EvaluationMatch] = _merged(_first, list)
    damaged_files: list[str] = _merged(_first, list)
    unreadable_files: list[str] = _merged(operator.add, list)
    """All: they are tried again."""
    file_problems: dict[str, str] = _merged(_first_of_both, dict)
    """{label of a damaged or unreadable file: why}"""
    splits: dict[str, Counts] = _merged(_added, dict)
    """{split: {documents, rows, tokens}}"""
    seconds: dict[str, float] = _merged(_added, dict)
    """CPU time by step, summed over workers."""

    def add(
        self,
        outcome: str,
        document: Document,
        value: Measure = None,
        limit: Measure = None,
        shown: str | None = None,
    ) -> None:
        """Note the end of one document; a sample shows the beginning of its text, or `shown`."""
        text, language = document.text, document.language
        data = text.encode("utf-8", "surrogatepass")
        counts = self.outcomes.setdefault(language, {}).setdefault(outcome, [0, 0])
        counts[0] += 1
        counts[1] += len(data)
        if outcome == KEPT:
            self.add_length("characters", len(text))
        mark = hashlib.blake2b(data, digest_size=8).hexdigest()
        samples = self.samples.setdefault(outcome, [])
        if len(samples) < SAMPLES_PER_OUTCOME or mark < samples[-1]["hash"]:
            sample: Sample = {
                "hash": mark,
                "text": text[:SAMPLE_CHARS] if shown is None else shown,
                "value": value,
                "limit": limit,
                "place": document.place,
                "language": language,
            }
            self.samples = _smallest(self.samples, {outcome: [sample]})

    def add_length(self, of: str, length: int) -> None:
        """Note the length of a kept document in `of` ("characters", "tokens")."""
        counts = self.histograms.setdefault(of, {})
        counts[_bin(length)] = counts.get(_bin(length), 0) + 1

    def add_edits(self, kind: str, number: int) -> None:
        """Note `number` changes to a kept document."""
        if number:
            self.edits[kind] = self.edits.get(kind, 0) + number

    def add_seconds(self, step: str, seconds: float) -> None:
        """Note CPU time that a step took."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    def documents(self, outcome: str | None = None) -> int:
        """Documents of one outcome, or all that were read."""
        return sum(
            counts[0]
            for by_outcome in self.outcomes.values()
            for name, counts in by_outcome.items()
            if outcome in (None, name)
        )

    def refused(self) -> Counter[str]:
        """Documents by the rule that refused them."""
        refused: Counter[str] = Counter()
        for by_outcome in self.outcomes.values():
            for name, counts in by_outcome.items():
                if name != KEPT:
                    refused[name] += counts[0]
        return refused


@dataclass
class Rejects:
    """Records that could not be used: all counted by reason, the first few kept with where they stood."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[RejectedRecord] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Sound records that hold no document (a redirect or an image in a WARC), by reason: no loss."""

    def add(self, reason: str, source: str, line: int, excerpt: str | bytes = "", count: int = 1) -> None:
        """Note `count` records of `source` (the label of a part) lost for `reason`."""
        self.counts[reason] += count
        if len(self.examples) < _MAX_EXAMPLES:
            text = excerpt.decode("utf-8", "replace") if isinstance(excerpt, bytes) else excerpt
            text = text[:_EXCERPT_CHARS].encode("utf-8", "replace").decode("utf-8")
            self.examples.append({"reason": reason, "source": source, "line": line, "text": text})


def timed(items: Iterable[T], step: str, report: Report) -> Iterator[T]:
    """The items; the CPU time that they take is noted as the step's, less what steps before it note meanwhile."""
    iterator = iter(items)
    while True:
        begun, noted = time.thread_time(), sum(report.seconds.values())
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            elsewhere = sum(report.seconds.values()) - noted
            report.add_seconds(step, max(0.0, time.thread_time() - begun - elsewhere))
        yield item


def merge(reports: Iterable[Report]) -> Report:
    """The sum of reports, field by field."""
    total: Report | None = None
    for report in reports:
        total = total or Report(report.source)
        for figure in fields(Report):
            of_total, of_report = getattr(total, figure.name), getattr(report, figure.name)
            setattr(total, figure.name, figure.metadata["merge"](of_total, of_report))
    return total or Report()


def _bin(length: int) -> str:
    """k with 2^k <= length < 2^(k+1), as a JSON key."""
    return str(max(length, 1).bit_length() - 1)
