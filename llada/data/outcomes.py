"""What became of the documents of a work unit, and the sum of many such reports.

    Report   documents by what ended them, bytes, samples, CPU time: added up over units, stored as JSON
    Rejects  records that could not become a document: counted by reason, the first ones kept as examples
Counts add up; samples are kept by the hash of their text, so that the same ones stay whatever the order of adding.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypedDict, TypeVar

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


@dataclass
class Report:
    """Documents, bytes and files of one unit or of many."""

    source: str = ""
    units: int = 0
    input_bytes: int = 0
    outcomes: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """{language: {outcome: [documents, bytes of UTF-8]}}; an outcome is "kept" or the rule that refused."""
    rejected: Counts = field(default_factory=dict)
    """Records that could not be read, by reason."""
    skipped: Counts = field(default_factory=dict)
    """Sound records that hold no document, by reason."""
    edits: Counts = field(default_factory=dict)
    """Of kept documents: addresses replaced, lines and examples removed."""
    histograms: dict[str, Counts] = field(default_factory=dict)
    """{"characters" | "tokens" of the kept: {k: documents with 2^k <= length < 2^(k+1)}}"""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """By outcome."""
    matches: list[EvaluationMatch] = field(default_factory=list)
    damaged_files: list[str] = field(default_factory=list)
    unreadable_files: list[str] = field(default_factory=list)
    splits: dict[str, Counts] = field(default_factory=dict)
    """{split: {documents, rows, tokens}}"""
    seconds: dict[str, float] = field(default_factory=dict)
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
            self.samples[outcome] = _smallest([*samples, sample])

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
    """The sum of reports; of samples the ones with the smallest hashes stay."""
    total: Report | None = None
    for report in reports:
        if total is None:
            total = Report(report.source)
        if report.source != total.source:
            total.source = ""
        total.units += report.units
        total.input_bytes += report.input_bytes
        for language, by_outcome in report.outcomes.items():
            sums = total.outcomes.setdefault(language, {})
            for outcome, (documents, size) in by_outcome.items():
                counts = sums.setdefault(outcome, [0, 0])
                counts[0] += documents
                counts[1] += size
        for name in ("rejected", "skipped", "edits", "seconds"):
            _add(getattr(total, name), getattr(report, name))
        for name in ("histograms", "splits"):
            for key, counts_of in getattr(report, name).items():
                _add(getattr(total, name).setdefault(key, {}), counts_of)
        for outcome, samples in report.samples.items():
            total.samples[outcome] = _smallest([*total.samples.get(outcome, []), *samples])
        for name in ("matches", "damaged_files"):
            named = getattr(total, name)
            named += getattr(report, name)[: _MAX_NAMED - len(named)]
        total.unreadable_files += report.unreadable_files  # all: they are tried again
    return total or Report()


def _add(counts: dict, more: dict) -> None:
    for key, value in more.items():
        counts[key] = counts.get(key, 0) + value


def _smallest(samples: list[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: sample["hash"])[:SAMPLES_PER_OUTCOME]


def _bin(length: int) -> str:
    """k with 2^k <= length < 2^(k+1), as a JSON key."""
    return str(max(length, 1).bit_length() - 1)
