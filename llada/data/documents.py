"""Read documents from files at any fsspec URL, losing nothing silently.

    expand_inputs(urls)   files, folders and globs -> InputFile, in a fixed order
    read_records(part)    JSON lines, parquet rows or texts -> Record
    read_documents(part)  the same -> Document

JSON lines and text may be compressed (.gz, .zst). Whatever cannot be read goes to a `Rejects`: counted by reason,
the first ones kept as examples. A damaged file loses what is damaged and keeps the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llada.data.files import filesystem

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text", ".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUPPORTED = ".jsonl .ndjson .json (one object a line) .txt (each also .gz .zst) .parquet"
_READ_BYTES = 1 << 18
_TEXT_SEPARATOR = b"<|endoftext|>"
_EXCERPT_CHARS = 200
_MAX_EXAMPLES = 200


@dataclass(frozen=True)
class InputFile:
    """One input file. `name` is its path below the input that was given, so it survives a move of the whole input;
    `identity` changes when the file changes (the store's ETag, or size and modification time)."""

    url: str
    name: str
    size: int
    identity: str


@dataclass(frozen=True)
class Part:
    """A file, or a piece of it: bytes [start, end) of JSON lines (a line belongs to the piece it starts in), or
    row groups [start, end) of a parquet file. `end` None means up to the end. `size` is the work in bytes."""

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
    """One JSON object, parquet row or text (as {"text": ...}); `line` counts from 1."""

    fields: dict[str, Any]
    line: int


@dataclass(frozen=True)
class Document:
    """A text with a name. `id` is the record's own id, or a hash of the text; `source` is URL:line."""

    id: str
    text: str
    source: str


@dataclass
class Rejects:
    """Records that could not be used: all counted by reason, the first few kept with where they stood."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, reason: str, part: Part, line: int, excerpt: str | bytes = "", count: int = 1) -> None:
        """Note `count` records lost for `reason`."""
        self.counts[reason] += count
        if len(self.examples) < _MAX_EXAMPLES:
            text = excerpt.decode("utf-8", "replace") if isinstance(excerpt, bytes) else excerpt
            text = text[:_EXCERPT_CHARS].encode("utf-8", "replace").decode("utf-8")
            self.examples.append({"reason": reason, "source": part.label, "line": line, "text": text})


def file_format(url: str) -> tuple[str, str | None]:
    """("jsonl" | "text" | "parquet", None | "gzip" | "zstd") by the file name. Raises ValueError when unknown."""
    stem, suffix = os.path.splitext(url.lower())
    compression = _COMPRESSIONS.get(suffix)
    kind = _FORMATS.get(os.path.splitext(stem)[1] if compression else suffix)
    if kind is None or (kind == "parquet" and compression):
        raise ValueError(f"cannot read {url}: the file name must end in one of {SUPPORTED}")
    return kind, compression


def expand_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """The files behind files, folders (searched below) and globs, in the order given and then by name.

    Raises FileNotFoundError or ValueError naming the input that gives nothing readable.
    """
    files: dict[str, InputFile] = {}
    names: Counter[str] = Counter()
    for given in inputs:
        for url, name, info in _expand(given):
            if url in files:
                continue
            names[name] += 1
            unique = name if names[name] == 1 else f"{name}#{names[name]}"
            identity = info.get("ETag") or info.get("etag") or f"{info['size']}-{info.get('mtime')}"
            files[url] = InputFile(url, unique, int(info["size"]), str(identity).strip('"'))
    return list(files.values())


def _expand(given: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(url, relative name, file system info) of each file of one input."""
    fs, path = filesystem(given)
    if fs.isfile(path):
        file_format(given)
        yield given, os.path.basename(path), fs.info(path)
        return
    is_glob = any(character in path for character in "*?[")
    found = fs.glob(path, detail=True) if is_glob else fs.find(path, detail=True) if fs.isdir(path) else {}
    if not found:
        raise FileNotFoundError(f"no input at {given}: no such file, folder or match")
    root = os.path.dirname(path.split("*")[0].split("?")[0].split("[")[0]) if is_glob else path.rstrip("/")
    readable = 0
    for file_path, info in sorted(found.items()):
        name = file_path[len(root) :].strip("/")
        if info["type"] != "file" or any(piece.startswith((".", "_")) for piece in name.split("/")):
            continue
        try:
            file_format(file_path)
        except ValueError:
            if is_glob:
                raise
            continue  # a README beside the data is no error
        readable += 1
        yield fs.unstrip_protocol(file_path) if "://" in given else file_path, name, info
    if not readable:
        raise ValueError(f"nothing to read in {given}: file names must end in one of {SUPPORTED}")


def read_documents(
    part: Part, rejects: Rejects, *, text_field: str, max_record_bytes: int
) -> Iterator[Document]:
    """The documents of a part. Text files ignore `text_field`. See `read_records` for what is rejected; here also
    records whose text is missing, no string, empty, or holds a NUL or half a surrogate pair."""
    name = "text" if file_format(part.file.url)[0] == "text" else text_field
    for record in read_records(part, rejects, max_record_bytes=max_record_bytes, columns=[name, "id"]):
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
        yield Document(identifier, text, f"{part.label}:{record.line}")


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
    part: Part, rejects: Rejects, *, max_record_bytes: int, columns: Sequence[str] | None = None
) -> Iterator[Record]:
    """The records of a part; `columns` limits what is read of a parquet file (all when None).

    Rejected, with their reason: broken JSON, JSON that is no object, bytes that are no UTF-8, records of more than
    `max_record_bytes`, the damaged rest of a compressed file, damaged parquet files and row groups.
    """
    kind, compression = file_format(part.file.url)
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
                        decompressor = _decompressor(compression)
                    yield decompressor.decompress(data)
                    data = decompressor.unused_data if decompressor.eof else b""
                    if decompressor.eof:
                        decompressor = None
        except Exception as error:
            if not isinstance(error, zlib.error) and type(error).__name__ != "ZstdError":
                raise
            rejects.add("damaged_file", part, 0, f"{compression} error: {error}")
            yield None
            return
        if decompressor is not None:
            rejects.add("truncated_file", part, 0, f"the {compression} stream ends before its end mark")
            yield None


def _decompressor(compression: str) -> Any:
    if compression == "gzip":
        return zlib.decompressobj(wbits=31)
    try:
        import zstandard
    except ImportError:
        raise ImportError("reading .zst files needs the package zstandard: pip install zstandard") from None
    return zstandard.ZstdDecompressor().decompressobj()


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


def _read_parquet(
    part: Part, rejects: Rejects, columns: Sequence[str] | None, max_bytes: int
) -> Iterator[Record]:
    fs, path = filesystem(part.file.url)
    with fs.open(path, "rb") as stream:
        try:
            table = pq.ParquetFile(stream)
        except (pa.ArrowException, OSError) as error:
            rejects.add("damaged_file", part, 0, f"parquet error: {error}")
            return
        if columns is not None:
            columns = [name for name in columns if name in table.schema_arrow.names]
        line = sum(table.metadata.row_group(g).num_rows for g in range(part.start))
        for group in range(part.start, table.num_row_groups if part.end is None else part.end):
            last = line + table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(256, row_groups=[group], columns=columns):
                    for row in range(batch.num_rows):
                        line += 1
                        fields = _parquet_row(batch.slice(row, 1), part, line, rejects, max_bytes)
                        if fields is not None:
                            yield Record(fields, line)
            except (pa.ArrowException, OSError) as error:
                rejects.add("damaged_row_group", part, line + 1, f"parquet error: {error}", count=last - line)
                line = last


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
