"""CSV and TSV: a row is a record, its fields named by the first row. Quoted fields may hold line breaks."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator

from llada.data.outcomes import Rejects
from llada.data.read.compression import split_compression
from llada.data.read.fields import no_field
from llada.data.read.parts import Part, Reader, ReadOptions, Record
from llada.data.read.stream import read_texts


def read_csv(part: Part, options: ReadOptions, rejects: Rejects) -> Iterator[Record]:
    """The rows of a part, each field a string. Columns stand between commas, or between semicolons, tabs or bars where
    that gives the text column; in a .tsv between tabs.

    Rejected: rows that are no CSV ("invalid_csv"), too large, or have more or fewer fields than the first row
    ("wrong_number_of_fields"), a file without the text column ("missing_text"), and what `read_texts` rejects.
    """
    csv.field_size_limit(max(csv.field_size_limit(), options.max_record_bytes))
    texts = read_texts(
        part, b"\n", options.max_record_bytes, rejects, encoding=options.encoding, with_blank=True
    )
    lines = _Lines(texts, options.max_record_bytes, rejects)
    is_tsv = split_compression(part.file.url)[0].endswith(".tsv")
    header: list[str] | None = None
    for delimiter in "\t" if is_tsv else ",;\t|":
        # The text column alone tells what stands between columns.
        _, row = next(_rows(lines, delimiter, part, rejects), (0, []))
        names = [name.strip() for name in row]
        if header is None or options.text_field in names:
            header, chosen = names, delimiter
        if options.columns is None or options.text_field in names:
            break
        lines.again()
    if not header:
        return
    lines.again()
    rows = _rows(lines, chosen, part, rejects)
    next(rows, None)
    if options.columns is not None and options.text_field not in header:
        rejects.add_fault("missing_text", part.label, no_field(options.text_field, header), line=1)
        return
    for line, row in rows:
        if len(row) == len(header):
            yield Record(dict(zip(header, row, strict=True)), line)
        else:
            rejects.add("wrong_number_of_fields", part.label, line, str(row))


class _Lines:
    """The lines of a file for `csv.reader`, which takes as many as a row needs; those of the row can be had again."""

    def __init__(self, texts: Iterator[tuple[int, str]], max_bytes: int, rejects: Rejects) -> None:
        self._texts = texts
        self._max_bytes = max_bytes
        self._rejects = rejects
        self._waiting: deque[tuple[int, str]] = deque()
        self.taken: list[tuple[int, str]] = []
        """(number, text) of those of the row."""
        self.is_too_large = False
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        lost_before = self._rejects.counts.total()
        number, text = self._waiting.popleft() if self._waiting else next(self._texts)
        if self.taken and self._rejects.counts.total() != lost_before:
            self._waiting.appendleft((number, text))
            raise csv.Error("a line of the row is lost")
        self.taken.append((number, text))
        self._size += len(text)
        if self._size > self._max_bytes:
            self.is_too_large = True
            raise csv.Error("the row is too large")
        return text + "\n"

    def begin(self) -> None:
        """A new row starts."""
        self.taken, self._size, self.is_too_large = [], 0, False

    def again(self, first: int = 0) -> None:
        """Give the row's lines from the `first` on again."""
        self._waiting.extendleft(reversed(self.taken[first:]))
        self.begin()


def _rows(lines: _Lines, delimiter: str, part: Part, rejects: Rejects) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of each row."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    width = 0
    while True:
        lines.begin()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number, text = lines.taken[0]
            reason = "too_large" if lines.is_too_large else "invalid_csv"
            rejects.add(reason, part.label, number, f"{error}: {text}")
            # A quote that is never closed costs its own line alone. With one column, what was meant to stand inside
            # quotes could not be told from rows.
            lines.again(1) if width > 1 else lines.begin()
            continue
        if row:
            width = width or len(row)
            yield lines.taken[0][0], row


CSV = Reader((".csv", ".tsv"), read_csv, is_compressible=True, note="with a header")
