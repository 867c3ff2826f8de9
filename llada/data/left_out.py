"""What stands among the input and is not read: files and folders, counted by reason, the first few of each by name.

left_out: FilesLeftOut = {}
leave_out(left_out, "*.md", "web/README.md")
summary(left_out)                              -> "*.md 1 (web/README.md)"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

_MAX_REASONS = 100  # a folder of x.0001, x.0002, ... has a suffix for each file
_MAX_EXAMPLES = 3
_OTHER = "other"


class LeftOut(TypedDict):
    """What is left out for one reason."""

    files: int
    """And folders, of which what they hold is not counted."""
    examples: list[str]


FilesLeftOut = dict[str, LeftOut]
"""By reason: "*.md", "hidden", "empty", ..."""


def leave_out(left_out: FilesLeftOut, reason: str, *names: str, files: int = 1) -> None:
    """Count `files` more for `reason`, of which `names` are some."""
    if reason not in left_out and len(left_out) >= _MAX_REASONS:
        reason = _OTHER
    entry = left_out.setdefault(reason, {"files": 0, "examples": []})
    entry["files"] += files
    # A name that is not UTF-8 could not be written into a manifest.
    shown = (name.encode("utf-8", "backslashreplace").decode() for name in names)
    entry["examples"] = [*entry["examples"], *shown][:_MAX_EXAMPLES]


def added(total: FilesLeftOut, more: FilesLeftOut) -> FilesLeftOut:
    """The sum of both."""
    both: FilesLeftOut = {}
    for part in (total, more):
        for reason, entry in part.items():
            leave_out(both, reason, *entry["examples"], files=entry["files"])
    return both


def summary(left_out: Mapping[str, LeftOut]) -> str:
    """In one line, the most frequent reasons first: "*.md 2 (a.md, b.md), hidden 1 (.x)"; "none" of nothing."""
    ranked = sorted(left_out.items(), key=lambda item: (-item[1]["files"], item[0]))
    return ", ".join(f"{reason} {entry['files']:,} ({_named(entry)})" for reason, entry in ranked) or "none"


def _named(entry: LeftOut) -> str:
    # A line break in a name is part of it, and would break the line.
    names = [name.encode("unicode_escape").decode() if "\n" in name else name for name in entry["examples"]]
    return ", ".join(names) + (", ..." if entry["files"] > len(names) else "")
