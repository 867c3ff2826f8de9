"""The log of a Ray job as a terminal shows it: progress bars in one line, Ray's dumps of its own state left out.

Ray's job server reads a log by lines, and takes the return with which a progress bar begins (tqdm: "\\r" and the whole bar,
no newline) for the end of one. So each state of a bar arrives as a line, and what is written next stands behind it.
"""

from __future__ import annotations

import re

_BAR = re.compile(
    r"(?:[^|\n]*: )? *\d+%\|[^|\n]*\| [^\[\n]*\[[^\]\n]*\]|(?:[^|\n]*: )?\d+\w* \[\d+:\d\d[^\]\n]*\]"
)
# What a raylet that has died leaves behind: its last lines, indented.
_DUMP = re.compile(r" {4}\[(state-dump|\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+)\]")
_DUMP_FOLLOWS = re.compile(r" Last \d+ lines of the Raylet logs:$")
_COLOURS = re.compile(r"\x1b\[\d*m")


class JobLog:
    """A log that comes in pieces; `read` gives what a terminal is to be sent."""

    def __init__(self) -> None:
        self._rest = ""
        self._shown = 0  # characters of the bar that stands in the terminal's last line
        self._empty_lines = 0  # held back: before a bar, one is the return that it begins with
        self._in_dump = False

    def read(self, piece: str) -> str:
        """What to write for the next piece."""
        *lines, self._rest = (self._rest + piece).split("\n")
        text = "".join(self._line(line) for line in lines)
        if _BAR.fullmatch(
            self._rest
        ):  # Ray's reader waits for what comes behind a bar, the terminal must not
            text, self._rest = text + self._line(self._rest), ""
        return text

    def close(self) -> str:
        """What to write at the end."""
        rest, self._rest = self._rest, ""
        return (self._line(rest) if rest else "") + self._erase()

    def _line(self, line: str) -> str:
        if bar := _BAR.match(line):
            self._empty_lines = 0
            shown = "\r" + bar.group().ljust(self._shown)
            self._shown = len(bar.group())
            behind = line[bar.end() :].lstrip()
            return shown + (self._line(behind) if behind else "")
        plain = _COLOURS.sub("", line)
        if _DUMP.match(plain):
            self._in_dump = True
            return ""
        if not plain:
            self._empty_lines += not (self._shown or self._in_dump)
            return ""
        if plain.isspace():  # tqdm erases a bar so
            return self._erase()
        self._in_dump, empty, self._empty_lines = False, self._empty_lines, 0
        return self._erase() + "\n" * empty + _DUMP_FOLLOWS.sub("", plain) + "\n"

    def _erase(self) -> str:
        width, self._shown = self._shown, 0
        return "\r" + " " * width + "\r" if width else ""
