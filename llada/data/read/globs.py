"""Patterns of file names: "*", "**", "?", "[ab]" and "{a,b}", where no file or folder is called just so."""

from __future__ import annotations

import re
from typing import Any

from fsspec.utils import glob_translate

from llada.errors import UserError

_PATTERN = re.compile(r"[*?\[]|\{[^{}]*,.*\}", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


def is_pattern(path: str) -> bool:
    """Whether a name can stand for others."""
    return _PATTERN.search(path) is not None


def split_pattern(fs: Any, path: str) -> tuple[str, str]:
    """(the folder below which all that matches lies, the pattern of what is below it). A folder that is there is meant
    by its name, whatever characters that holds."""
    pieces = path.split("/")
    for count, piece in enumerate(pieces[:-1]):
        may_match = re.search(r"[*?\[{]", piece) and is_pattern("/".join(pieces[count:]))
        if may_match and not fs.isdir("/".join(pieces[: count + 1])):
            return "/".join(pieces[:count]), "/".join(pieces[count:])
    return "/".join(pieces[:-1]), pieces[-1]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """What matches the paths of the files that a pattern names, and of all files in the folders that it names. Brackets
    and braces also stand for themselves. Raises UserError."""
    # "[[]" is an opening bracket.
    alternatives = dict.fromkeys([*_expanded(pattern), pattern.replace("[", "[[]")])
    try:
        translated = [glob_translate(alternative).removesuffix(r"\Z") for alternative in alternatives]
    except ValueError as error:
        raise UserError(f"the pattern {pattern}: {error}") from None
    return re.compile(rf"(?s:(?:{'|'.join(translated)})(?:/.*)?)")


def _expanded(pattern: str) -> list[str]:
    """A pattern without braces for each choice that those leave."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [each for choice in braces[1].split(",") for each in _expanded(before + choice + after)]
