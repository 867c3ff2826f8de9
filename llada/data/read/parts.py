"""Where records are read from, and what they are: input files, parts of them, records; and the protocol of a reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llada.data.outcomes import Rejects
from llada.data.read.extraction import Extractor


@dataclass(frozen=True)
class InputFile:
    """One input file (see listing.py). `name` is its path below the input, so it survives a move of the whole input;
    `identity` changes when the file changes (the store's ETag, or size and modification time)."""

    url: str
    name: str
    size: int | None
    """In bytes; None when a web server does not tell."""
    identity: str


@dataclass(frozen=True)
class Part:
    """A file, or a piece of it: bytes [start, end) of a file whose format can be cut (a record belongs to the piece
    it starts in). `end` None means up to the end. `size` is the work in bytes."""

    file: InputFile
    size: int
    start: int = 0
    end: int | None = None

    @property
    def label(self) -> str:
        """The URL, with the piece when it is one; lines are counted from the start of the piece."""
        whole = self.start == 0 and self.end is None
        end = "" if self.end is None else self.end
        return self.file.url if whole else f"{self.file.url}#{self.start}-{end}"


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object, row, text (as {"text": ...}) or page (as {"id": ..., "url": ..., "text": ...}); `line` counts
    lines, rows, texts or WARC records from 1."""

    fields: dict[str, Any]
    line: int
    is_only: bool = False
    """Whether it stands alone in a file of a format that also serves to describe data: it may be no record."""


@dataclass(frozen=True)
class ReadOptions:
    """What readers need to know; each takes of it what concerns its format."""

    text_field: str = "text"
    """The field of a record that holds the text, where the format leaves the choice."""
    max_record_bytes: int = 64 << 20
    """Larger records are rejected before they are parsed."""
    extractor: Extractor = "resiliparse"
    """What finds the main text of an HTML page."""
    chat_fields: Mapping[str, str] = field(default_factory=dict)
    chat_roles: Mapping[str, str] = field(default_factory=dict)
    """How dialogues are told, where it is not as usual; see `ReadConfig`."""
    columns: tuple[str, ...] | None = None
    """Fields that are wanted, where reading fewer is cheaper; "a.b" is field b of a. None: all."""
    encoding: str | None = None
    """Of files of text; None: UTF-8."""
    cuts_texts: bool = False
    """Whether a text that is too large for a record may come in pieces."""


@dataclass(frozen=True)
class Reader:
    """How the files of one format are read."""

    suffixes: tuple[str, ...]
    """What their names end in, in lower case: (".jsonl",)."""
    records: Callable[[Part, ReadOptions, Rejects], Iterator[Record]]
    """The records of a part, one at a time; what cannot be used goes to the rejects. A store's errors are let through."""
    is_compressible: bool = False
    """Whether they may be compressed as a whole (.gz, .zst)."""
    is_divisible: bool | Callable[[str], bool] = False
    """Whether `records` can read the piece [start, end) of an uncompressed file; where not all files of the format can
    be cut, what says so of a URL."""
    text_field: str | None = None
    """The field in which every record has its text; None: `ReadOptions.text_field` says."""
    note: str = ""
    """What a user must know of the format, behind the suffixes: "one object a line"."""
