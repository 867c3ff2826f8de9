"""Fields of records, whatever format they come from: found by name, and read as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

MISSING: Final = object()
"""The value of a field that a record does not have."""
_MAX_NAMES = 20


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, or MISSING. "a.b" is the field of that name or, where there is none, field b of a."""
    if name in record:
        return record[name]
    first, *others = name.split(".")
    value = record.get(first, MISSING)
    for other in others:
        value = value.get(other, MISSING) if isinstance(value, Mapping) else MISSING
    return value


def text_of(value: Any, encoding: str | None = None) -> Any:
    """The text that a value holds: a string; bytes, decoded (from UTF-8, if no encoding is given); or the strings of a list,
    one a line, without its nulls. Any other value as it is.

    Raises UnicodeDecodeError.
    """
    if isinstance(value, bytes):
        return value.decode(encoding or "utf-8")
    if isinstance(value, list):
        pieces = [text_of(piece, encoding) for piece in value if piece is not None]
        if pieces and all(isinstance(piece, str) for piece in pieces):
            return "\n".join(pieces)
    return value


def no_field(name: str, there: Iterable[str]) -> str:
    """What is said of records without a field: "no field 'text', but 'body', 'id'"."""
    names = [repr(other) for other in there]
    shown = names[:_MAX_NAMES] + ["..."] * (len(names) > _MAX_NAMES)
    return f"no field {name!r}, but {', '.join(shown) or 'none at all'}; see read.text_field"
