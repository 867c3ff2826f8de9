"""JSON in a file: an array of objects, objects one behind the other however they are laid out, or one object a line.

An array is read piece by piece, whatever its size. Of an object that stands alone in its file one cannot know whether it
is a record or describes the data beside it: its record says so (`Record.is_only`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, NamedTuple

from llada.data.outcomes import Rejects
from llada.data.read.json_lines import read_json_lines
from llada.data.read.parts import Part, Reader, ReadOptions, Record
from llada.data.read.stream import read_characters
from llada.files import open_bytes, storage_errors

_HEAD_BYTES = 1 << 16
_SPACE = re.compile("[\ufeff \t\r\n]*")
_SEPARATOR = re.compile(r"[ \t\r\n,]*")
_UNDECODED = re.compile("[\udc80-\udcff]")
_NEAR_END = 16  # where an error may only mean that a word, number or escape is cut
_EXCERPT_CHARS = 200
_BOUNDARY_CHARS = 256  # what stands between two objects, at most
_LOST = "lost"  # and counted already
_DECODER = json.JSONDecoder()


def read_json(part: Part, options: ReadOptions, rejects: Rejects) -> Iterator[Record]:
    """The objects of a part. Rejected: "invalid_json", "not_an_object", "too_large", "not_utf8", "truncated_file", and
    what the readers of lines and bytes reject; an array of anything else than objects is left out."""
    if part.start > 0 or part.end is not None:  # only lines are cut
        yield from read_json_lines(part, options, rejects)
        return
    layout = _layout(_head(part, options.encoding))
    if layout == "lines":
        records = read_json_lines(part, options, rejects)
    else:
        records = _objects(read_characters(part, rejects, options.encoding), layout, part, options, rejects)
    first, second = next(records, None), next(records, None)
    if first is None:
        return
    if second is None:
        yield first if layout == "array" else replace(first, is_only=True)
        return
    yield from chain([first, second], records)


def is_lines(url: str) -> bool:
    """Whether an uncompressed file holds an object a line, so that it may be cut."""
    with storage_errors(url), open_bytes(url) as stream:
        head = stream.read(_HEAD_BYTES)
    return _layout(head.decode("utf-8", "ignore")) == "lines"


def _head(part: Part, encoding: str | None) -> str:
    """The beginning of a file, decompressed."""
    head = ""
    for piece in read_characters(part, Rejects(), encoding):  # what is wrong with it is told by who reads it
        head += piece or ""
        if len(head) >= _HEAD_BYTES:
            break
    return head


Layout = Literal["lines", "array", "values"]


def _layout(head: str) -> Layout:
    """How a file that begins so is laid out; "values": objects that may take several lines."""
    head = head.lstrip("\ufeff \t\r\n")
    if head.startswith("["):
        return "array"
    line, line_break, _ = head.partition("\n")
    if not head.startswith("{") or not line_break or _decoded(line, 0):
        return "lines"
    try:
        _DECODER.raw_decode(head)
    except RecursionError:
        return "lines"
    except json.JSONDecodeError as error:
        # The first line of many may be broken; an object that goes on behind the head is not.
        return "values" if _may_go_on(error, head, len(head) < _HEAD_BYTES) else "lines"
    return "values"


def _decoded(text: str, start: int) -> tuple[Any, int] | None:
    """(the value that begins at `start`, its end), or None."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def _may_go_on(error: json.JSONDecodeError, text: str, is_complete: bool) -> bool:
    """Whether `error` says no more than that the text ends inside a value."""
    end = len(text.rstrip()) if is_complete else len(text) - _NEAR_END
    return error.pos >= end or error.msg.startswith("Unterminated string")


class _Found(NamedTuple):
    """A value, or the reason why it is none."""

    reason: str
    excerpt: str
    value: Any = None
    is_whole: bool = False
    """Whether its end is known."""


class _Window:
    """The characters of a stream that are still needed. `gap`: some are lost behind them."""

    def __init__(self, pieces: Iterable[str | None]) -> None:
        self._pieces = iter(pieces)
        self.text = ""
        self.start = 0
        self.has_gap = False
        self.is_complete = False
        """Whether the stream is at its end."""

    def grow(self) -> bool:
        """Read about as much again as is there; False at the end, or where some is lost."""
        self.text, self.start = self.text[self.start :], 0
        pieces, wanted = [self.text], max(len(self.text), 1)
        while wanted > 0 and not self.has_gap and not self.is_complete:
            try:
                piece = next(self._pieces)
            except StopIteration:
                self.is_complete = True
                break
            if piece is None:
                self.has_gap = True
                break
            pieces.append(piece)
            wanted -= len(piece)
        grown = len(pieces) > 1
        self.text = "".join(pieces)
        return grown

    def skip(self, what: re.Pattern[str]) -> str:
        """Pass over what matches; the character behind it, "" at the end."""
        while True:
            match = what.match(self.text, self.start)
            self.start = match.end() if match else self.start
            if self.start < len(self.text):
                return self.text[self.start]
            if not self.grow():
                return ""


def _objects(
    pieces: Iterable[str | None], layout: Layout, part: Part, options: ReadOptions, rejects: Rejects
) -> Iterator[Record]:
    """The objects of an array, or of a file of such."""
    window = _Window(pieces)
    window.skip(_SPACE)
    indent = "\n"
    if layout == "array":
        window.start += 1
        before = window.start
        window.skip(_SPACE)
        indent = "\n" + window.text[before : window.start].rpartition("\n")[2]
    number, is_guess = 0, False
    while True:
        following = window.skip(_SEPARATOR)
        if not following and not window.has_gap:
            if layout == "array":
                rejects.add("truncated_file", part.label, number + 1, "the array has no end")
            return
        if layout == "array" and following == "]":
            window.start += 1
            if rest := window.skip(_SPACE):
                excerpt = window.text[window.start :]
                rejects.add("invalid_json", part.label, number + 1, f"{rest and excerpt!r} behind the array")
            return
        number += 1
        found = _next_value(window, options.max_record_bytes, is_guess=is_guess)
        if isinstance(found.value, dict) and not found.reason:
            yield Record(found.value, number)
        elif not found.reason and number == 1 and layout == "array":
            rejects.leave_out("JSON array that holds no objects", part.label)
            return
        elif found.reason != _LOST and not is_guess:
            rejects.add(found.reason or "not_an_object", part.label, number, found.excerpt)
        elif found.reason != _LOST:
            number -= 1  # no object, but what looked like the start of one in the broken one before it
        is_guess = not found.is_whole
        if is_guess and not _find_next(window, indent):
            return


def _next_value(window: _Window, max_chars: int, *, is_guess: bool) -> _Found:
    """What begins at the window's start, which then is behind it, or where it is broken."""
    while True:
        text, start = window.text, window.start
        excerpt = text[start : start + _EXCERPT_CHARS]
        try:
            value, end = _DECODER.raw_decode(text, start)
        except RecursionError:
            window.start += 1
            return _Found("invalid_json", excerpt)
        except json.JSONDecodeError as error:
            if not _may_go_on(error, text, window.is_complete):
                # What looked like an object in a broken one may end where the next begins.
                window.start = start + 1 if is_guess else max(error.pos, start + 1)
                return _Found("invalid_json", excerpt)
            if len(text) - start > max_chars:
                window.start = len(text)
                return _Found("too_large", excerpt)
            if window.grow():
                continue
            return _Found(_LOST if window.has_gap else "truncated_file", excerpt)
        if end == len(text) and not isinstance(value, dict | list | str) and window.grow():
            continue  # a number may go on
        window.start = end
        if end - start > max_chars:
            return _Found("too_large", excerpt, is_whole=True)
        if _UNDECODED.search(text, start, end):
            return _Found("not_utf8", excerpt, is_whole=True)
        return _Found("", excerpt, value, is_whole=True)


def _find_next(window: _Window, indent: str) -> bool:
    """Move to the object after a broken one: the next that begins a line as the first one does, or that follows on
    another; False when there is none."""
    begins_line = re.compile(re.escape(indent) + r"\{")
    follows = re.compile(r"\}[ \t\r]*,[ \t\r]*\{")
    while True:
        found = begins_line.search(window.text, window.start)
        if found is None and indent == "\n":
            found = follows.search(window.text, window.start)
        if found is not None and not window.has_gap:
            window.start = found.end() - 1
            return True
        if window.has_gap:
            window.text, window.start, window.has_gap = "", 0, False
        else:
            window.start = max(window.start, len(window.text) - _BOUNDARY_CHARS)
        if not window.grow() and not window.has_gap:
            return False


JSON = Reader(
    (".json",), read_json, is_compressible=True, is_divisible=is_lines, note="objects, or arrays of them"
)
