"""Clean texts, and cut long ones into sections."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace

from llada.data.document import Document

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


def clean(documents: Iterable[Document], section_chars: int | None = None) -> Iterator[Document]:
    """The documents with clean texts, each cut into sections of about `section_chars` characters, if given."""
    for document in documents:
        for section in _sections(clean_text(document.text), section_chars):
            yield replace(document, text=section)


def _sections(text: str, section_chars: int | None) -> Iterator[str]:
    """A text cut at empty lines, or at any line end, failing that."""
    while section_chars is not None and len(text) > section_chars:
        cut = text.rfind("\n\n", section_chars // 2, section_chars)
        cut = cut if cut >= 0 else text.rfind("\n", section_chars // 2, section_chars)
        cut = cut if cut >= 0 else section_chars
        yield text[:cut].strip("\n")
        text = text[cut:].strip("\n")
    yield text
