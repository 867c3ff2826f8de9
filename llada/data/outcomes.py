"""What became of the documents of a work unit, and the sum of many such reports.

Counts add up; samples are kept by the hash of their text, so that the same ones stay whatever the order of adding.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

KEPT = "kept"
SAMPLES_PER_OUTCOME = 4
SAMPLE_CHARS = 600
_MAX_NAMED = 1000  # files and matches that a report lists by name; the counts go on

Counts = dict[str, int]


@dataclass
class Report:
    """Documents, bytes and files of one unit or of many.

    outcomes    {language: {outcome: [documents, bytes of UTF-8]}}; an outcome is "kept" or the rule that refused
    rejected    records that could not be read, by reason; `skipped`: sound ones that hold no document
    histograms  {"characters" | "tokens" of the kept: {k: documents with 2^k <= length < 2^(k+1)}}
    samples     {outcome: [{hash, text, value, limit, place, language}]}
    seconds     CPU time by step, summed over workers
    """

    source: str = ""
    units: int = 0
    input_bytes: int = 0
    outcomes: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    rejected: Counts = field(default_factory=dict)
    skipped: Counts = field(default_factory=dict)
    edits: Counts = field(
        default_factory=dict
    )  # of kept documents: addresses replaced, lines and examples removed
    histograms: dict[str, Counts] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    matches: list[dict[str, Any]] = field(default_factory=list)
    damaged_files: list[str] = field(default_factory=list)
    unreadable_files: list[str] = field(default_factory=list)
    splits: dict[str, Counts] = field(default_factory=dict)  # {split: {documents, rows, tokens}}
    seconds: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        outcome: str,
        text: str,
        language: str,
        place: str = "",
        value: Any = None,
        limit: Any = None,
        shown: str | None = None,
    ) -> None:
        """Note the end of one document; a sample shows its beginning, or `shown`."""
        data = text.encode("utf-8", "surrogatepass")
        counts = self.outcomes.setdefault(language, {}).setdefault(outcome, [0, 0])
        counts[0] += 1
        counts[1] += len(data)
        if outcome == KEPT:
            self.add_length("characters", len(text))
        mark = hashlib.blake2b(data, digest_size=8).hexdigest()
        held = self.samples.setdefault(outcome, [])
        if len(held) < SAMPLES_PER_OUTCOME or mark < held[-1]["hash"]:
            sample = {
                "hash": mark,
                "text": text[:SAMPLE_CHARS] if shown is None else shown,
                "value": value,
                "limit": limit,
                "place": place,
                "language": language,
            }
            self.samples[outcome] = _smallest([*held, sample])

    def add_length(self, of: str, length: int) -> None:
        counts = self.histograms.setdefault(of, {})
        counts[_bin(length)] = counts.get(_bin(length), 0) + 1

    def add_edits(self, kind: str, number: int) -> None:
        if number:
            self.edits[kind] = self.edits.get(kind, 0) + number

    def add_seconds(self, step: str, seconds: float) -> None:
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
            held = total.outcomes.setdefault(language, {})
            for outcome, (documents, size) in by_outcome.items():
                counts = held.setdefault(outcome, [0, 0])
                counts[0] += documents
                counts[1] += size
        for name in ("rejected", "skipped", "edits", "seconds"):
            _add(getattr(total, name), getattr(report, name))
        for name in ("histograms", "splits"):
            for key, counts in getattr(report, name).items():
                _add(getattr(total, name).setdefault(key, {}), counts)
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


def _smallest(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: sample["hash"])[:SAMPLES_PER_OUTCOME]


def _bin(length: int) -> str:
    """k with 2^k <= length < 2^(k+1), as a JSON key."""
    return str(max(length, 1).bit_length() - 1)
