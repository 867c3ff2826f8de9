"""The formats that can be read: one row per reader. A new format is a file like json_lines.py and a row here."""

from __future__ import annotations

import os
from collections.abc import Iterator

from llada.data.outcomes import Rejects
from llada.data.read.compression import COMPRESSIONS, split_compression
from llada.data.read.csv_rows import CSV
from llada.data.read.json_lines import JSON_LINES
from llada.data.read.json_values import JSON
from llada.data.read.parquet import PARQUET
from llada.data.read.parts import Part, Reader, ReadOptions, Record
from llada.data.read.text import TEXT
from llada.data.read.warc import WARC
from llada.errors import UserError
from llada.registry import Registry

READERS: Registry[Reader] = Registry(
    "reader",
    {
        "json_lines": JSON_LINES,
        "json": JSON,
        "csv": CSV,
        "text": TEXT,
        "warc": WARC,
        "parquet": PARQUET,
    },
)


def find_reader(url: str) -> Reader | None:
    """The reader of a file, by its name; None when there is none."""
    stem, compression = split_compression(url)
    suffix = os.path.splitext(stem)[1]
    for reader in READERS.values():
        if suffix in reader.suffixes and (reader.is_compressible or not compression):
            return reader
    return None


def reader_of(url: str) -> Reader:
    """The reader of a file, by its name. Raises UserError when there is none."""
    if (reader := find_reader(url)) is None:
        raise UserError(f"cannot read {url}: the file name must end in one of {supported()}")
    return reader


def ending_of(url: str) -> str:
    """How to speak of files with names like this one: "*.md", "*.tar.gz", "*.jsonl.lz4", "no suffix"."""
    stem, suffix = os.path.splitext(url.lower())
    if not suffix:
        return "no suffix"
    inner = os.path.splitext(stem)[1]
    known = {inner for reader in READERS.values() for inner in reader.suffixes}
    return f"*{inner}{suffix}" if inner in known or suffix in COMPRESSIONS else f"*{suffix}"


def may_be_empty(url: str) -> bool:
    """Whether a file of no bytes is a sound one, without records: of some formats even that needs a few."""
    return reader_of(url).is_compressible and split_compression(url)[1] is None


def is_divisible(url: str) -> bool:
    """Whether a file may be read in pieces."""
    divisible = reader_of(url).is_divisible
    if split_compression(url)[1] is not None:
        return False
    return divisible(url) if callable(divisible) else divisible


def supported() -> str:
    """What names of files may end in: ".jsonl .txt (each also .gz .zst) .parquet"."""

    def listed(is_compressible: bool) -> list[str]:
        return [
            " ".join(reader.suffixes) + (f" ({reader.note})" if reader.note else "")
            for reader in READERS.values()
            if reader.is_compressible is is_compressible
        ]

    return " ".join([*listed(True), f"(each also {' '.join(COMPRESSIONS)})", *listed(False)])


def read_records(part: Part, rejects: Rejects, options: ReadOptions | None = None) -> Iterator[Record]:
    """The records of a part, in order. Each reader says what it rejects."""
    yield from reader_of(part.file.url).records(part, options or ReadOptions(), rejects)
