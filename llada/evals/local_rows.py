"""Rows and texts of the files that a task names: JSON and plain text, compressed or not, at any URL."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llada.errors import UserError, hint
from llada.files import open_text

TEXT = (".txt",)
JSON_LINES = (".jsonl", ".ndjson")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def stem_of(url: str) -> str:
    """A file's name without its endings: "ptb" of "s3://b/ptb.txt.gz"."""
    return url.rstrip("/").rpartition("/")[2].partition(".")[0]


def is_json_lines(url: str) -> bool:
    """Whether a file's name says that it holds JSON lines."""
    return _plain_name(url).endswith(JSON_LINES)


def is_readable(url: str) -> bool:
    """Whether a file's name says that it holds text or JSON lines."""
    return is_json_lines(url) or _plain_name(url).endswith(TEXT)


def read_text(url: str) -> str:
    """All of a text file, line ends as "\n". Raises UserError naming it."""
    return "".join(lines_of(url))


def lines_of(url: str) -> Iterator[str]:
    """The lines of a text file, each with its end, "\n". Raises UserError naming it."""
    try:
        with open_text(url) as stream:
            yield from stream
    except FileNotFoundError:
        raise UserError(f"there is no file {url}") from None
    except (UnicodeDecodeError, EOFError) as error:
        raise UserError(f"{url} is no sound UTF-8 text: {error}") from None


def read_rows(url: str) -> list[dict[str, Any]]:
    """The objects of a file: of JSON lines, or a .json file that is a list. Raises UserError naming the file, and the line that is
    none."""
    return list(rows_of(url))


def rows_of(url: str) -> Iterator[dict[str, Any]]:
    """`read_rows`, one at a time."""
    name = _plain_name(url)
    if not name.endswith((*JSON_LINES, ".json")):
        raise UserError(
            f"{url} must be JSON lines, with a name in {' or '.join(JSON_LINES)}, or a list in a .json file"
        )
    number = 0
    for number, row in _values(url, is_list=name.endswith(".json")):
        if not isinstance(row, dict):
            raise UserError(f"{url}, row {number} is no JSON object")
        yield row
    if number == 0:
        raise UserError(f"{url} holds no rows")


def _values(url: str, *, is_list: bool) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of a list's items, or of the lines that are not empty."""
    pieces = [read_text(url)] if is_list else lines_of(url)
    for number, piece in enumerate(pieces, start=1):
        if not piece.strip():
            continue
        try:
            value = json.loads(piece)
        except ValueError as error:
            raise UserError(f"{url}, line {number} is no JSON: {error}") from None
        rows = value if is_list and isinstance(value, list) else [value]
        has_escapes = _SURROGATE.search(piece) is not None
        for at, row in enumerate(rows, start=1 if is_list else number):
            if has_escapes:
                _require_text(row, f"{url}, row {at}")
            yield at, row


def _require_text(row: Any, place: str) -> None:
    """Raises UserError for half of a surrogate pair, which JSON can spell and no encoding has."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = str(error.object)[error.start]
        raise UserError(f"{place} holds {half!r}, half of a surrogate pair, which is no text") from None


def field_of(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...], place: str) -> Any:
    """A row's field. Raises UserError naming the place where it is missing, and the nearest one, or of another type."""
    if name not in row:
        raise UserError(f"{place} has no field {name!r}; {hint(name, row)}")
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{place}: the field {name!r} must be {names}, not {value!r:.60}")
    return value


def is_finite(value: float) -> bool:
    """Whether it is a number that can be reckoned with; an integer of JSON may be beyond all of them."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _plain_name(url: str) -> str:
    name = url.lower()
    return next((name.removesuffix(end) for end in _COMPRESSED if name.endswith(end)), name)
