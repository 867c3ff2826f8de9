"""Clean a text and decide whether its length is acceptable. Nothing here looks at more than one document."""

from __future__ import annotations

import re
import unicodedata

_LINE_BREAKS = re.compile("[\u0085\u2028\u2029]")
# Control characters (tab and newline excepted), the byte order mark and the soft hyphen: invisible, never wanted.
_INVISIBLE = re.compile("[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\ufeff]")
_ASCII_INVISIBLE = bytes([*range(0x09), *range(0x0B, 0x20), 0x7F])
_ODD_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f]")
_MANY_NEWLINES = re.compile(r"\n{4,}")


def clean_text(text: str) -> str:
    """NFC, one kind of line break and of space, no invisible characters, at most two empty lines in a row.

    Indentation is kept, because it carries meaning in code. Applying it twice changes nothing.
    """
    # The tests in between cost nothing and spare most texts most of the substitutions.
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = _LINE_BREAKS.sub("\n", text)
        text = _INVISIBLE.sub("", text)
        text = _ODD_SPACES.sub(" ", unicodedata.normalize("NFC", text))
    elif len(kept := text.encode().translate(None, _ASCII_INVISIBLE)) < len(text):
        text = kept.decode()
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    if "\n\n\n\n" in text:
        text = _MANY_NEWLINES.sub("\n\n\n", text)
    return text.strip("\n")


def length_reason(text: str, min_chars: int, max_chars: int | None) -> str | None:
    """Why a text is refused for its length ("too_short", "too_long"), or None when it is kept."""
    if len(text) < min_chars:
        return "too_short"
    if max_chars is not None and len(text) > max_chars:
        return "too_long"
    return None
