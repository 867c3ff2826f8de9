"""Records to documents, and the documents of the parts of a work unit, with patience for a store that fails.

    for document in read(unit.parts, read_documents, ReadOptions(), report, rejects): ...

A file that the store does not deliver stops the reading of its unit; `patiently` begins again, and in the end does
without the file. A damaged file gives what of it is sound and is named in the report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from llada.data.document import Document, text_problem
from llada.data.outcomes import Rejects, Report, timed
from llada.data.read.fields import MISSING, field_of, no_field, text_of
from llada.data.read.formats import read_records, reader_of
from llada.data.read.listing import is_as_listed
from llada.data.read.parts import Part, ReadOptions
from llada.store_errors import StoreError, is_store_error, may_pass, reason

T = TypeVar("T")
DocumentsOf = Callable[[Part, Rejects, ReadOptions], Iterator[Document]]
"""The documents of one part: `read_documents`, or `read_dialogues` of dialogues.py."""

_ATTEMPTS = 3
_BACK_OFF_S = 2.0  # then 4: beside the retries that s3fs makes itself


class UnreadableFileError(OSError):
    """A file that the store did not deliver, however often it was asked."""

    def __init__(self, part: Part, error: Exception) -> None:
        self.part, self.reason, self.may_pass = part, reason(error), may_pass(error)
        super().__init__(f"{part.label} cannot be read: {self.reason}")


def read(
    parts: Iterable[Part],
    documents_of: DocumentsOf,
    options: ReadOptions,
    report: Report,
    rejects: Rejects,
    *,
    skip: frozenset[str] = frozenset(),
) -> Iterator[Document]:
    """The documents of parts, in order; the report learns of damaged files and of the CPU time. `skip`: labels of parts
    to leave out.

    Raises UnreadableFileError when a file cannot be had; what came before is then to be thrown away.
    """
    for part in parts:
        if part.label in skip:
            continue
        try:
            is_there = is_as_listed(part.file)
        except StoreError as error:
            raise UnreadableFileError(part, error) from error
        if not is_there:
            raise UnreadableFileError(part, OSError("it is gone, or has changed since it was listed"))
        before = rejects.counts.copy()
        yield from timed(_guarded(part, documents_of(part, rejects, options)), "read", report)
        lost = rejects.counts - before
        if any(reason.startswith(("damaged", "truncated", "empty_file")) for reason in lost):
            report.damaged_files.append(part.label)


def _guarded(part: Part, documents: Iterator[Document]) -> Iterator[Document]:
    """The documents; the store's errors carry the part."""
    try:
        yield from documents
    except Exception as error:
        # The readers turn damage into rejects; what is left is the store, or a fault of ours.
        if is_store_error(error):
            raise UnreadableFileError(part, error) from error
        raise


def read_documents(part: Part, rejects: Rejects, options: ReadOptions) -> Iterator[Document]:
    """The documents of a part. Beside what the reader rejects, records are rejected whose text is missing, no string
    (and no list of such), empty, or no text: see `text_problem`."""
    name = reader_of(part.file.url).text_field or options.text_field
    columns = (name, "id", "url", "metadata.url")  # the id for the rejects' examples
    for record in read_records(part, rejects, replace(options, columns=columns)):
        try:
            text = text_of(field_of(record.fields, name), options.encoding)
        except UnicodeDecodeError as error:
            undecoded = "undecodable" if options.encoding else "not_utf8"
            rejects.add(undecoded, part.label, record.line, error.object)
            continue
        if text is MISSING and record.is_only:
            rejects.leave_out(f"JSON object without {name!r}", part.label)
            continue
        if text is MISSING:
            rejects.add_fault("missing_text", part.label, no_field(name, record.fields), line=record.line)
            continue
        if (reason := text_problem(text)) or not isinstance(text, str):
            excerpt = json.dumps(record.fields, default=str, ensure_ascii=False)
            rejects.add(reason or "text_not_a_string", part.label, record.line, excerpt)
            continue
        yield Document(text, f"{part.label}:{record.line}", _url(record.fields))


def _url(fields: dict[str, Any]) -> str | None:
    """The record's `url`, or the `url` in its `metadata`."""
    metadata = fields.get("metadata")
    for url in (fields.get("url"), metadata.get("url") if isinstance(metadata, dict) else None):
        if isinstance(url, str) and url:
            return url
    return None


def patiently(read: Callable[[frozenset[str]], T]) -> tuple[T, dict[str, str]]:
    """(read(skip), {label of a part given up: why}): again, with pauses, after an UnreadableFileError that may pass, then
    without it."""
    failures: dict[str, int] = {}
    given_up: dict[str, str] = {}
    while True:
        try:
            return read(frozenset(given_up)), dict(sorted(given_up.items()))
        except UnreadableFileError as error:
            label = error.part.label
            failures[label] = failures.get(label, 0) + 1
            if failures[label] < _ATTEMPTS and error.may_pass:
                time.sleep(_BACK_OFF_S * 2 ** (failures[label] - 1))
            else:
                given_up[label] = error.reason
