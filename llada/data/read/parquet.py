"""Parquet: a row is a record. A damaged file loses its damaged row groups and keeps the rest.

Only the columns that are wanted are read, and of these a value that Python cannot express (a date in the year 300,000)
is None, unless it is the text.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llada.data.outcomes import Rejects
from llada.data.read.fields import no_field
from llada.data.read.parts import Part, Reader, ReadOptions, Record
from llada.files import open_seekable

_BATCH_ROWS = 256
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)


def read_parquet(part: Part, options: ReadOptions, rejects: Rejects) -> Iterator[Record]:
    """The rows of a part, of `options.columns` alone. Rejected: "too_large", "not_utf8", all rows of a file without the
    text column ("missing_text"), damaged files and row groups."""
    with open_seekable(part.file.url) as opened:
        stream = _Watched(opened)
        try:
            table = pq.ParquetFile(stream, page_checksum_verification=True)
            wanted, missing = _columns(table, options)
        except _DAMAGE as error:
            stream.raise_error()
            if part.start == 0:  # the other parts of the file see the same
                rejects.add_fault("damaged_file", part.label, f"parquet error: {error}")
            return
        last = 0
        for group in range(table.num_row_groups):
            line, last = last, last + table.metadata.row_group(group).num_rows
            if line == last or not _begins_in(part, table, group):
                continue
            if missing:
                rejects.add_fault("missing_text", part.label, missing, line=line + 1, lost=last - line)
                continue
            try:
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=wanted):
                    for fields in _rows(batch, options):
                        line += 1
                        if isinstance(fields, _Rejected):
                            rejects.add(fields.reason, part.label, line, fields.excerpt)
                        else:
                            yield Record(fields, line)
            except _DAMAGE as error:
                stream.raise_error()
                why = f"parquet error: {error}"
                rejects.add_fault(
                    "damaged_row_group", part.label, why, line=line + 1, lost=max(1, last - line)
                )
                line = last


class _Rejected(NamedTuple):
    """A value, or a row, that cannot be used."""

    reason: str
    excerpt: bytes | str = ""


class _Watched(io.RawIOBase):
    """A stream that remembers its own errors: pyarrow reports damage by OSError too."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._error: Exception | None = None

    def raise_error(self) -> None:
        """Raise what the store answered, if it was the store that failed."""
        if self._error is not None:
            raise self._error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        return self._call(self._stream.read, -1 if size is None else size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._call(self._stream.seek, offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            self._error = error
            raise


def _columns(table: pq.ParquetFile, options: ReadOptions) -> tuple[list[str] | None, str]:
    """(the columns to read, None for all; what to say when the text is not among them)."""
    if options.columns is None:
        return None, ""
    paths = [table.schema.column(leaf).path.split(".") for leaf in range(len(table.schema))]
    # A column may have a point in its name.
    there = {".".join(path[: depth + 1]) for path in paths for depth in range(len(path))}
    wanted = [name for name in options.columns if name in there]
    if options.text_field in options.columns and options.text_field not in wanted:
        return wanted, no_field(options.text_field, table.schema_arrow.names)
    return wanted, ""


def _begins_in(part: Part, table: pq.ParquetFile, group: int) -> bool:
    """Whether the part has to read a row group; one whose place makes no sense is the first part's."""
    column = table.metadata.row_group(group).column(0)
    first_byte = int(column.dictionary_page_offset or column.data_page_offset)
    size = math.inf if part.file.size is None else part.file.size
    if not 0 <= first_byte < size:
        return part.start == 0
    return part.start <= first_byte < (part.end or size)


def _rows(batch: pa.RecordBatch, options: ReadOptions) -> Iterator[dict[str, Any] | _Rejected]:
    """The fields of each row, or why it is rejected."""
    names = batch.schema.names
    for values in zip(*map(_values, batch.columns), strict=True):
        fields: dict[str, Any] = dict(zip(names, values, strict=True))
        rejected: _Rejected | None = None
        for name, value in fields.items():
            if isinstance(value, _Rejected):
                fields[name] = None
                if _is_needed(name, value, options):
                    rejected = rejected or value
            elif _size(value) > options.max_record_bytes:
                rejected = rejected or _Rejected("too_large")
        yield rejected or fields


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except Exception:  # one value is enough
        return [_value(cell) for cell in column]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return _Rejected("not_utf8", bytes(error.object))
    except Exception as error:  # out of the range of Python's dates, in an unknown time zone, ...
        return _Rejected("text_not_a_string", f"{cell.type}: {error}")


def _is_needed(name: str, value: _Rejected, options: ReadOptions) -> bool:
    """Whether a row is of no use without a value."""
    if options.columns is None:
        return value.reason == "not_utf8"
    return name in (options.text_field, options.text_field.split(".")[0])


def _size(value: Any) -> int:
    """Characters or bytes, about."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


PARQUET = Reader((".parquet",), read_parquet, is_divisible=True)
