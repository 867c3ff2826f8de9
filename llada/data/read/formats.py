"""Read documents from files at any fsspec URL, losing nothing silently.

    read_records(part)    JSON lines, parquet rows, texts or the HTML pages of a WARC -> Record
    read_documents(part)  the same -> Document

JSON lines, text and WARC may be compressed (.gz, .zst). Whatever cannot be read goes to a `Rejects`: counted by reason,
the first ones kept as examples. A damaged file loses what is damaged and keeps the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llada.data.read.compression import decompressor as new_decompressor
from llada.data.read.compression import is_damage
from llada.data.read.extraction import Extractor, decode_html, text_extractor
from llada.data.read.warc import Lost, Skipped, read_pages
from llada.files import filesystem

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".warc": "warc",
    ".parquet": "parquet",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUPPORTED = ".jsonl .ndjson .json (one object a line) .txt .warc (each also .gz .zst) .parquet"
_READ_BYTES = 1 << 18
_TEXT_SEPARATOR = b"<|endoftext|>"
_EXCERPT_CHARS = 200
_MAX_EXAMPLES = 200


@dataclass(frozen=True)
class InputFile:
    """One input file (see listing.py). `name` is its path below the input, so it survives a move of the whole input;
    `identity` changes when the file changes (the store's ETag, or size and modification time)."""

    url: str
    name: str
    size: int
    identity: str


@dataclass(frozen=True)
class Part:
    """A file, or a piece of it: bytes [start, end) of JSON lines or parquet (a line or row group belongs to the piece
    it starts in). `end` None means up to the end. `size` is the work in bytes."""

    file: InputFile
    size: int
    start: int = 0
    end: int | None = None

    @property
    def label(self) -> str:
        """The URL, with the piece when it is one; lines are counted from the start of the piece."""
        whole = self.start == 0 and self.end is None
        return (
            self.file.url if whole else f"{self.file.url}#{self.start}-{'' if self.end is None else self.end}"
        )


@dataclass(frozen=True)
class Record:
    """One JSON object, parquet row, text (as {"text": ...}) or page of a WARC (as {"id": ..., "url": ..., "text": ...});
    `line` counts lines, rows, texts or WARC records from 1."""

    fields: dict[str, Any]
    line: int


@dataclass(frozen=True)
class Document:
    """A text with a name. `id` is the record's own id (WARC-Record-ID), or a hash of the text; `source` is URL:line;
    `url` is where the text was published, when the record says so."""

    id: str
    text: str
    source: str
    url: str | None = None


@dataclass
class Rejects:
    """Records that could not be used: all counted by reason, the first few kept with where they stood.

    `skipped` counts, by reason, sound records that hold no document (a redirect or an image in a WARC): no loss.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, part: Part, line: int, excerpt: str | bytes = "", count: int = 1) -> None:
        """Note `count` records lost for `reason`."""
        self.counts[reason] += count
        if len(self.examples) < _MAX_EXAMPLES:
            text = excerpt.decode("utf-8", "replace") if isinstance(excerpt, bytes) else excerpt
            text = text[:_EXCERPT_CHARS].encode("utf-8", "replace").decode("utf-8")
            self.examples.append({"reason": reason, "source": part.label, "line": line, "text": text})


def file_format(url: str) -> tuple[str, str | None]:
    """("jsonl" | "text" | "warc" | "parquet", None | "gzip" | "zstd") by the file name. Raises ValueError when unknown."""
    stem, suffix = os.path.splitext(url.lower())
    compression = _COMPRESSIONS.get(suffix)
    kind = _FORMATS.get(os.path.splitext(stem)[1] if compression else suffix)
    if kind is None or (kind == "parquet" and compression):
        raise ValueError(f"cannot read {url}: the file name must end in one of {SUPPORTED}")
    return kind, compression


def read_documents(
    part: Part,
    rejects: Rejects,
    *,
    text_field: str,
    max_record_bytes: int,
    extractor: Extractor = "resiliparse",
) -> Iterator[Document]:
    """The documents of a part. Text and WARC files ignore `text_field`. See `read_records` for what is rejected; here
    also records whose text is missing, no string, empty, or holds a NUL or half a surrogate pair."""
    name = "text" if file_format(part.file.url)[0] in ("text", "warc") else text_field
    columns = [name, "id", "url", "metadata.url"]
    for record in read_records(
        part, rejects, max_record_bytes=max_record_bytes, columns=columns, extractor=extractor
    ):
        text = record.fields.get(name)
        reason = text_problem(text) if name in record.fields else "missing_text"
        if reason or not isinstance(text, str):
            rejects.add(
                reason or "text_not_a_string",
                part,
                record.line,
                json.dumps(record.fields, default=str, ensure_ascii=False),
            )
            continue
        own = record.fields.get("id")
        identifier = (
            str(own)
            if isinstance(own, str | int)
            else hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        )
        yield Document(identifier, text, f"{part.label}:{record.line}", _url(record.fields))


def _url(fields: dict[str, Any]) -> str | None:
    """The record's `url`, or the `url` in its `metadata`."""
    metadata = fields.get("metadata")
    for url in (fields.get("url"), metadata.get("url") if isinstance(metadata, dict) else None):
        if isinstance(url, str) and url:
            return url
    return None


def text_problem(text: Any) -> str | None:
    """Why a value cannot be a text, or None."""
    if text is None:
        return "null_text"
    if not isinstance(text, str):
        return "text_not_a_string"
    if not text.strip():
        return "empty_text"
    if "\x00" in text:
        return "nul_character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "not_utf8"
    return None


def read_records(
    part: Part,
    rejects: Rejects,
    *,
    max_record_bytes: int,
    columns: Sequence[str] | None = None,
    extractor: Extractor = "resiliparse",
) -> Iterator[Record]:
    """The records of a part; `columns` limits what is read of a parquet file (all when None; "a.b" is field b of a).

    Rejected, with their reason: broken JSON, JSON that is no object, bytes that are no UTF-8, records of more than
    `max_record_bytes`, the damaged rest of a compressed file, damaged parquet files and row groups, damaged WARC
    records and pages no text can be extracted from.
    """
    kind, compression = file_format(part.file.url)
    if kind == "warc":
        yield from _read_warc(part, compression, rejects, max_record_bytes, extractor)
        return
    if kind == "parquet":
        yield from _read_parquet(part, rejects, columns, max_record_bytes)
        return
    separator = b"\n" if kind == "jsonl" else _TEXT_SEPARATOR
    for line, data in enumerate(
        _split(_chunks(part, compression, rejects), separator, part, max_record_bytes), 1
    ):
        if data is None:
            rejects.add("too_large", part, line)
            continue
        if line == 1 and part.start == 0:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if not data.strip():
            continue  # an empty line, or what follows the last separator, is no record
        try:
            text = data.decode("utf-8")
            fields = json.loads(text) if kind == "jsonl" else {"text": text}
        except UnicodeDecodeError:
            rejects.add("not_utf8", part, line, data)
            continue
        except (ValueError, RecursionError):
            rejects.add("invalid_json", part, line, data)
            continue
        if isinstance(fields, dict):
            yield Record(fields, line)
        else:
            rejects.add("not_an_object", part, line, data)


def _chunks(part: Part, compression: str | None, rejects: Rejects) -> Iterator[bytes | None]:
    """The bytes of a part from its start to the end of the file; a final None says that the file is damaged there."""
    fs, path = filesystem(part.file.url)
    with fs.open(path, "rb") as stream:
        if compression is None:
            stream.seek(part.start)
            while data := stream.read(_READ_BYTES):
                yield data
            return
        decompressor: Any = None
        try:
            while data := stream.read(_READ_BYTES):
                while data:  # one file may hold several compressed members
                    if decompressor is None:
                        decompressor = new_decompressor(compression)
                    yield decompressor.decompress(data)
                    data = decompressor.unused_data if decompressor.eof else b""
                    if decompressor.eof:
                        decompressor = None
        except Exception as error:
            if not is_damage(error):
                raise
            rejects.add("damaged_file", part, 0, f"{compression} error: {error}")
            yield None
            return
        if decompressor is not None:
            rejects.add("truncated_file", part, 0, f"the {compression} stream ends before its end mark")
            yield None


def _split(
    chunks: Iterator[bytes | None], separator: bytes, part: Part, max_bytes: int
) -> Iterator[bytes | None]:
    """Cut a byte stream at `separator`; None stands for a record of more than `max_bytes`.

    Only records that start in [part.start, part.end) are given. The unfinished record of a damaged stream is dropped.
    """
    held, position = (
        bytearray(),
        part.start,
    )  # bytes of the record being collected; where it starts in the file
    skipped = 0  # bytes already thrown away of a record that is too large
    foreign = (
        part.start > 0
    )  # a piece starts inside a record of the piece before it, unless a separator precedes it
    if foreign:
        fs, path = filesystem(part.file.url)
        foreign = fs.cat_file(path, start=part.start - len(separator), end=part.start) != separator
    for chunk in chunks:
        if chunk is None:
            return
        search_from = max(0, len(held) - len(separator) + 1)  # the separator may lie across two chunks
        held += chunk
        begin = 0
        while (end := held.find(separator, max(search_from, begin))) >= 0:
            if part.end is not None and position >= part.end:
                return
            if not foreign:
                yield None if skipped or end - begin > max_bytes else bytes(held[begin:end])
            position += skipped + end + len(separator) - begin
            begin, skipped, foreign = end + len(separator), 0, False
        del held[:begin]
        if len(held) > max_bytes + len(separator):
            surplus = len(held) - len(separator) + 1
            skipped += surplus
            del held[:surplus]
    if not foreign and (held or skipped) and (part.end is None or position < part.end):
        yield None if skipped or len(held) > max_bytes else bytes(held)


def _read_warc(
    part: Part, compression: str | None, rejects: Rejects, max_bytes: int, extractor: Extractor
) -> Iterator[Record]:
    extract = text_extractor(extractor)
    fs, path = filesystem(part.file.url)
    with fs.open(path, "rb") as stream:
        for line, page in read_pages(stream, compression, max_bytes):
            if isinstance(page, Lost):
                rejects.add(page.reason, part, line, page.detail)
                continue
            if isinstance(page, Skipped):
                rejects.skipped[page.reason] += 1
                continue
            html = decode_html(page.html, page.charset)
            try:
                text = extract(html)
            except Exception as error:  # one page that a parser fails on does not stop a crawl of billions
                rejects.add("extraction_failed", part, line, f"{page.url}: {type(error).__name__}: {error}")
                continue
            if text:
                yield Record({"id": page.record_id or None, "url": page.url, "text": text}, line)
            else:
                rejects.skipped["no_main_content"] += 1


def _read_parquet(
    part: Part, rejects: Rejects, columns: Sequence[str] | None, max_bytes: int
) -> Iterator[Record]:
    fs, path = filesystem(part.file.url)
    with fs.open(path, "rb") as opened:
        stream = _Watched(opened)
        try:
            table = pq.ParquetFile(stream)
        except (pa.ArrowException, OSError) as error:
            stream.raise_error()
            rejects.add("damaged_file", part, 0, f"parquet error: {error}")
            return
        if columns is not None:
            leaves = {table.schema.column(leaf).path for leaf in range(len(table.schema))}
            columns = [name for name in columns if name in leaves or name in table.schema_arrow.names]
        line = 0
        for group in range(table.num_row_groups):
            last = line + table.metadata.row_group(group).num_rows
            if not part.start <= _first_byte(table, group) < (part.end or part.file.size):
                line = last
                continue
            try:
                for batch in table.iter_batches(256, row_groups=[group], columns=columns):
                    for row in range(batch.num_rows):
                        line += 1
                        fields = _parquet_row(batch.slice(row, 1), part, line, rejects, max_bytes)
                        if fields is not None:
                            yield Record(fields, line)
            except (pa.ArrowException, OSError) as error:
                stream.raise_error()
                rejects.add("damaged_row_group", part, line + 1, f"parquet error: {error}", count=last - line)
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


def _parquet_row(row: Any, part: Part, line: int, rejects: Rejects, max_bytes: int) -> dict[str, Any] | None:
    try:
        fields = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        rejects.add("not_utf8", part, line, bytes(error.object))
        return None
    if any(isinstance(value, str | bytes) and len(value) > max_bytes for value in fields.values()):
        rejects.add("too_large", part, line)
        return None
    return fields
