"""A work unit's documents: read, cleaned, filtered, decontaminated; whatever does not come out is in the report.

read_texts     documents of text → Text            (pretraining)
read_dialogues conversations → messages            (fine-tuning)
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from llada.data.dedup.decontaminate import DecontaminationIndex
from llada.data.filters.chain import FilterConfig, Filters, resolve_filters
from llada.data.filters.language import UNKNOWN
from llada.data.filters.pii import scrub
from llada.data.outcomes import SAMPLE_CHARS, Report
from llada.data.read.cleaning import clean_text, length_reason
from llada.data.read.extraction import Extractor
from llada.data.read.formats import Document, Part, Rejects, read_documents, read_records
from llada.data.read.listing import is_as_listed
from llada.data.tokens.chat import Message, RecordError, parse_dialogue, prompt_answer_pairs
from llada.data.work.units import Unit
from llada.files import is_store_error

T = TypeVar("T")
_ATTEMPTS = 3
_BACK_OFF_S = 2.0  # then 4: beside the retries that s3fs makes itself


@dataclass(frozen=True)
class ReadConfig:
    """How the documents of a source become clean text, and which are kept."""

    text_field: str = "text"
    """The field that holds the text in JSON lines and parquet (pretrain)."""
    extractor: Extractor = "resiliparse"
    """What finds the main text of the HTML pages in a WARC."""
    filters: tuple[str, ...] = ()
    """Filters to run (pretrain): "web" for FineWeb's, or any of url, language, gopher_repetition, gopher_quality, c4,
    fineweb, classifier, pii."""
    rules: FilterConfig = field(default_factory=FilterConfig)
    """Their settings."""
    min_chars: int = 1
    """Shorter documents are left out, after cleaning (pretrain)."""
    max_chars: int | None = None
    """Longer documents are left out; None keeps all (pretrain)."""
    section_chars: int | None = None
    """Cut longer documents at empty lines into sections of about this size, each a document of its own. For a corpus
    of a few very long texts, from which whole documents cannot be held out (pretrain)."""
    max_record_bytes: int = 64 << 20
    """Larger records are rejected before they are parsed."""

    def validate(self) -> None:
        """Raises ValueError naming the first setting that makes no sense."""
        checks = {
            "max_chars must be at least min_chars": self.max_chars is None
            or self.max_chars >= self.min_chars,
            "section_chars must be at least 100": self.section_chars is None or self.section_chars >= 100,
            "max_record_bytes must be positive": self.max_record_bytes > 0,
        }
        for problem, fine in checks.items():
            if not fine:
                raise ValueError(f"{problem} (it is {getattr(self, problem.split()[0])!r})")
        if "classifier" in set(resolve_filters(self.filters)) and self.rules.classifier.model is None:
            raise ValueError("the filter classifier needs rules.classifier.model, the folder of a classifier")


class Text(NamedTuple):
    """A document that is wanted so far."""

    text: str
    language: str
    place: str  # URL:line


@dataclass
class Reading:
    """What a reader needs beside the unit, and what it fills: the report and the rejected records."""

    config: ReadConfig
    report: Report
    decontamination: DecontaminationIndex | None = None
    rejects: Rejects = field(default_factory=Rejects)


class UnreadableFileError(OSError):
    """A file that the store did not deliver, however often it was asked."""

    def __init__(self, part: Part, error: Exception) -> None:
        super().__init__(f"{part.label} cannot be read: {error}")
        self.part = part


def read_texts(unit: Unit, reading: Reading, skip: frozenset[str] = frozenset()) -> Iterator[Text]:
    """The texts of a unit that pass, in order. `skip`: labels of parts to leave out.

    Raises UnreadableFileError when a file cannot be had; what came before of that unit is then to be thrown away.
    """
    config = reading.config
    filters = _filters(config.filters, config.rules)
    for part in _parts(unit, reading, skip):
        documents = read_documents(
            part,
            reading.rejects,
            text_field=config.text_field,
            max_record_bytes=config.max_record_bytes,
            extractor=config.extractor,
        )
        for document in _guarded(part, documents, reading.report):
            begun = time.thread_time()
            passed = [
                text
                for section in _sections(clean_text(document.text), config.section_chars)
                if (text := _passed(section, document, filters, reading)) is not None
            ]
            reading.report.add_seconds("filter", time.thread_time() - begun)
            yield from passed


def _passed(text: str, document: Document, filters: Filters, reading: Reading) -> Text | None:
    """The text, rewritten, or None when a filter refuses it."""
    config, report = reading.config, reading.report

    def refuse(rule: str, language: str, value: Any = None, limit: Any = None) -> None:
        # A sample in the report must not show what the filters would have taken out of the text.
        shown = scrub(text[:SAMPLE_CHARS], config.rules.pii)[0] if "pii" in filters.names else None
        report.add(rule, text, language, document.source, value, limit, shown=shown)

    if reason := length_reason(text, config.min_chars, config.max_chars):
        refuse(reason, UNKNOWN, len(text))
        return None
    filtered = filters(text, document.url)
    if verdict := filtered.verdict:
        refuse(verdict.rule, filtered.language, verdict.value, verdict.limit)
        return None
    if match := reading.decontamination and reading.decontamination.match(filtered.text):
        found = {"place": document.source, "file": match.file, "line": match.line, "words": match.words}
        report.matches.append(found)
        refuse("contaminated", filtered.language, match.words)
        return None
    for kind, count in filtered.pii.items():
        report.add_edits(kind, count)
    return Text(filtered.text, filtered.language, document.source)


def read_dialogues(
    unit: Unit, reading: Reading, skip: frozenset[str] = frozenset()
) -> Iterator[list[Message]]:
    """The dialogues of a unit, in order, each with at least one answer. `skip` and errors: as `read_texts`."""
    for part in _parts(unit, reading, skip):
        records = read_records(part, reading.rejects, max_record_bytes=reading.config.max_record_bytes)
        for record in _guarded(part, records, reading.report):
            try:
                messages = [m | {"content": clean_text(m["content"])} for m in parse_dialogue(record.fields)]
                prompt_answer_pairs(messages)
            except RecordError as problem:
                excerpt = json.dumps(record.fields, default=str, ensure_ascii=False)
                reading.rejects.add(str(problem), part, record.line, excerpt)
                continue
            yield messages


def patiently(read: Callable[[frozenset[str]], T]) -> tuple[T, list[str]]:
    """(read(skip), the labels of the parts given up): again, with pauses, after an UnreadableFileError, then without it."""
    failures: dict[str, int] = {}
    while True:
        given_up = frozenset(label for label, count in failures.items() if count >= _ATTEMPTS)
        try:
            return read(given_up), sorted(given_up)
        except UnreadableFileError as error:
            label = error.part.label
            failures[label] = failures.get(label, 0) + 1
            if failures[label] < _ATTEMPTS:
                time.sleep(_BACK_OFF_S * 2 ** (failures[label] - 1))


def _parts(unit: Unit, reading: Reading, skip: frozenset[str]) -> Iterator[Part]:
    """The parts to read; notes those in which something was damaged."""
    for part in unit.parts:
        if part.label in skip:
            continue
        if not is_as_listed(part.file):
            raise UnreadableFileError(part, OSError("it is gone, or has changed since it was listed"))
        before = reading.rejects.counts.copy()
        yield part
        lost = reading.rejects.counts - before
        if any(reason.startswith(("damaged", "truncated")) for reason in lost):
            reading.report.damaged_files.append(part.label)


def _guarded(part: Part, items: Iterator[T], report: Report) -> Iterator[T]:
    """The items of a reader; the store's errors carry the part."""
    while True:
        begun = time.thread_time()
        try:
            item = next(items, None)
        except Exception as error:
            # The readers turn damage into rejects; what is left is the store, or a fault of ours.
            if is_store_error(error):
                raise UnreadableFileError(part, error) from error
            raise
        report.add_seconds("read", time.thread_time() - begun)
        if item is None:
            return
        yield item


def _sections(text: str, section_chars: int | None) -> Iterator[str]:
    """A text cut at empty lines (or at any line end, failing that) into sections of about `section_chars`."""
    while section_chars is not None and len(text) > section_chars:
        cut = text.rfind("\n\n", section_chars // 2, section_chars)
        cut = cut if cut >= 0 else text.rfind("\n", section_chars // 2, section_chars)
        cut = cut if cut >= 0 else section_chars
        yield text[:cut].strip("\n")
        text = text[cut:].strip("\n")
    yield text


@functools.lru_cache(maxsize=4)
def _filters(names: tuple[str, ...], config: FilterConfig) -> Filters:
    """Loaded once per worker process."""
    return Filters(names, config)
