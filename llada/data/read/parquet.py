"""Parquet: a row is a record. A damaged file loses its damaged row groups and keeps the rest."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llada.data.outcomes import Rejects
from llada.data.read.parts import Part, Reader, ReadOptions, Record
from llada.files import open_seekable


def read_parquet(part: Part, options: ReadOptions, rejects: Rejects) -> Iterator[Record]:
    """The rows of a part, of `options.columns` alone. Rejected: "too_large", "not_utf8", damaged files and row groups."""
    columns: Sequence[str] | None = options.columns
    with open_seekable(part.file.url) as opened:
        stream = _Watched(opened)
        try:
            table = pq.ParquetFile(stream)
        except (pa.ArrowException, OSError) as error:
            stream.raise_error()
            rejects.add("damaged_file", part.label, 0, f"parquet error: {error}")
            return
        if columns is not None:
            leaves = {table.schema.column(leaf).path for leaf in range(len(table.schema))}
            columns = [name for name in columns if name in leaves or name in table.schema_arrow.names]
        line = 0
        for group in range(table.num_row_groups):
            last = line + table.metadata.row_group(group).num_rows
            if not part.start <= _first_byte(table, group) < (part.end or math.inf):
                line = last
                continue
            try:
                for batch in table.iter_batches(256, row_groups=[group], columns=columns):
                    for row in range(batch.num_rows):
                        line += 1
                        fields = _fields(batch.slice(row, 1), part, line, options, rejects)
                        if fields is not None:
                            yield Record(fields, line)
            except (pa.ArrowException, OSError) as error:
                stream.raise_error()
                lost = last - line
                rejects.add("damaged_row_group", part.label, line + 1, f"parquet error: {error}", lost)
                line = last


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


def _first_byte(table: pq.ParquetFile, group: int) -> int:
    column = table.metadata.row_group(group).column(0)
    return int(column.dictionary_page_offset or column.data_page_offset)


def _fields(
    row: pa.RecordBatch, part: Part, line: int, options: ReadOptions, rejects: Rejects
) -> dict[str, Any] | None:
    """The one row of a slice as a record's fields, or None when it is rejected."""
    try:
        fields = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        rejects.add("not_utf8", part.label, line, bytes(error.object))
        return None
    if any(
        isinstance(value, str | bytes) and len(value) > options.max_record_bytes for value in fields.values()
    ):
        rejects.add("too_large", part.label, line)
        return None
    return fields


PARQUET = Reader((".parquet",), read_parquet, is_divisible=True)
