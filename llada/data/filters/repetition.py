"""Refuse texts that repeat themselves: Gopher's repetition rules (Rae et al. 2021, arXiv 2112.11446, table A1).

A document fails when too large a share of its lines, paragraphs or characters lies in repeats. For n-grams the share
is either that of the most frequent one ("top", n = 2…4) or that of all that occurred before ("duplicate", n = 5…10).
The limits and the order of the rules are datatrove's, and so are two details that the paper leaves open: of equally
frequent n-grams the first counts, and n-grams that repeat are counted left to right without overlap.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from llada.data.document import Document
from llada.data.filters.filter import Filter, Filtered, Verdict
from llada.data.filters.view import TextView
from llada.mixing import GOLDEN_GAMMA

_PARAGRAPH_BREAK = re.compile(r"\n{2,}")
_HASH_MULTIPLIER = np.uint64(GOLDEN_GAMMA)  # odd: no bit of a word's key is lost

Limits = tuple[tuple[int, float], ...]  # (n, largest share)


@dataclass(frozen=True)
class GopherRepetition(Filter):
    """Largest shares that a document may have; None switches a rule off."""

    max_duplicate_paragraphs: float | None = 0.3
    max_duplicate_paragraph_chars: float | None = 0.2
    max_duplicate_lines: float | None = 0.3
    max_duplicate_line_chars: float | None = 0.2
    max_top_ngram_chars: Limits = ((2, 0.20), (3, 0.18), (4, 0.16))
    """(n, share of the characters that lie in the most frequent n-gram of words)."""
    max_duplicate_ngram_chars: Limits = (
        (5, 0.15),
        (6, 0.14),
        (7, 0.13),
        (8, 0.12),
        (9, 0.11),
        (10, 0.10),
    )
    """(n, share of the characters that lie in n-grams of words which occurred before)."""
    unsegmented_ngram_scale: int = 2
    """In scripts without spaces, where a word is a character: the n-grams of n words have this many times n."""

    label: ClassVar = "Gopher repetition"
    reasons: ClassVar = MappingProxyType(
        {
            "gopher_repetition.empty": "there is no text",
            "gopher_repetition.duplicate_paragraphs": "share of the paragraphs above `max_duplicate_paragraphs`",
            "gopher_repetition.duplicate_paragraph_chars": "their characters above `max_duplicate_paragraph_chars`",
            "gopher_repetition.duplicate_lines": "share of the lines above `max_duplicate_lines`",
            "gopher_repetition.duplicate_line_chars": "their characters above `max_duplicate_line_chars`",
            "gopher_repetition.top_N_gram": "the most frequent N-gram has more than `max_top_ngram_chars`",
            "gopher_repetition.duplicate_N_gram": "repeated N-grams have more than `max_duplicate_ngram_chars`",
        }
    )

    def __call__(self, document: Document, view: TextView) -> Filtered:
        return Filtered(document, self.verdict(view))

    def verdict(self, view: TextView) -> Verdict | None:
        """The first rule that a text fails, or None. The language does not matter here; the script does."""
        text = view.text
        stripped = text.strip()
        if not stripped:
            return Verdict("gopher_repetition.empty", 0, 1)
        checks = (
            ("paragraph", _paragraphs(stripped), self.max_duplicate_paragraphs, self.max_duplicate_paragraph_chars),
            ("line", _lines(text), self.max_duplicate_lines, self.max_duplicate_line_chars),
        )  # fmt: skip
        for unit, parts, max_share, max_chars in checks:
            count, chars = _duplicates(parts)
            if max_share is not None and count / len(parts) > max_share:
                return Verdict(f"gopher_repetition.duplicate_{unit}s", count / len(parts), max_share)
            if max_chars is not None and chars / len(text) > max_chars:
                return Verdict(f"gopher_repetition.duplicate_{unit}_chars", chars / len(text), max_chars)
        grams = _Ngrams(view)
        scale = self.unsegmented_ngram_scale if view.is_unsegmented else 1
        top_limits = tuple((n * scale, limit) for n, limit in self.max_top_ngram_chars)
        duplicate_limits = tuple((n * scale, limit) for n, limit in self.max_duplicate_ngram_chars)
        if top := _top_ngram(grams, top_limits, view.is_unsegmented):
            n, share, limit = top
            return Verdict(f"gopher_repetition.top_{n // scale}_gram", share, limit)
        if duplicate := _duplicate_ngram(grams, duplicate_limits):
            n, share, limit = duplicate
            return Verdict(f"gopher_repetition.duplicate_{n // scale}_gram", share, limit)
        return None


def _paragraphs(text: str) -> list[str]:
    return _PARAGRAPH_BREAK.split(text) if "\n\n\n" in text else text.split("\n\n")


def _lines(text: str) -> list[str]:
    """The parts between runs of line breaks, in no certain order: an empty one before a first and after a last run."""
    return [line for line in text.split("\n") if line] + [""] * (text.startswith("\n") + text.endswith("\n"))


def duplicate_chars(parts: list[str]) -> int:
    """Characters in parts that occurred before."""
    return _duplicates(parts)[1]


def _duplicates(parts: list[str]) -> tuple[int, int]:
    """How many parts occurred before, and their characters."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0, 0
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


class _Ngrams:
    """The n-grams of a view's words, each as one hash: equal for equal words (and, once in 2^64, by chance)."""

    def __init__(self, view: TextView) -> None:
        self.text_chars = len(view.text)
        self.keys = np.ascontiguousarray(view.words["key"])  # (words,)
        self.chars = view.words["chars"]  # (words,)
        self.ends = np.concatenate(([0], np.cumsum(self.chars, dtype=np.int64)))  # (words + 1,)
        self._hashes = {1: self.keys}

    def hashes(self, n: int) -> np.ndarray:
        """uint64 (words - n + 1,)."""
        if n not in self._hashes:
            shorter = self.hashes(n - 1)
            self._hashes[n] = shorter[:-1] * _HASH_MULTIPLIER + self.keys[n - 1 :]
        return self._hashes[n]

    def lengths(self, n: int) -> np.ndarray:
        """int64 (words - n + 1,): the characters of the words, without what stands between them."""
        return self.ends[n:] - self.ends[:-n]


def _top_ngram(grams: _Ngrams, limits: Limits, unsegmented: bool) -> tuple[int, float, float] | None:
    """(n, share, limit) of the first limit that the most frequent n-gram exceeds, spaces between words included."""
    most = len(grams.keys)  # no n-gram is more frequent than the shorter ones in it
    for n, limit in sorted(limits):
        if n > len(grams.keys):
            break
        lengths = grams.lengths(n) + (0 if unsegmented else n - 1)
        # Occurrences that even the longest n-gram may have.
        harmless = int(limit * grams.text_chars / int(lengths.max()))
        if most <= harmless:
            continue
        hashes = grams.hashes(n)
        ordered = np.sort(hashes)
        if harmless and not (ordered[harmless:] == ordered[:-harmless]).any():
            most = harmless
            continue
        order = np.argsort(hashes, kind="stable")
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        counts = np.diff(starts, append=len(ordered))
        most = int(counts.max())
        if most == 1 and unsegmented:
            break  # a few characters of a short poem, which never come again
        first = order[starts[counts == most]].min()  # of equally frequent ones the first in the text
        if (share := most * int(lengths[first]) / grams.text_chars) > limit:
            return n, share, limit
    return None


def _duplicate_ngram(grams: _Ngrams, limits: Limits) -> tuple[int, float, float] | None:
    """(n, share, limit) of the first limit that the n-grams which occurred before exceed."""
    lowest = min((limit for _, limit in limits), default=0) * grams.text_chars
    for n, limit in sorted(limits):
        if n > len(grams.keys):
            break
        # What repeated n-grams cover bounds what they count for, and holds all longer repeated ones.
        covered = _covered_chars(grams, n)
        if covered <= lowest:
            break
        if covered > limit * grams.text_chars and (
            (share := _repeated_chars(grams, n) / grams.text_chars) > limit
        ):
            return n, share, limit
    return None


def _covered_chars(grams: _Ngrams, n: int) -> int:
    """Characters of the words that lie in an n-gram which occurred before."""
    hashes = grams.hashes(n)
    ordered = np.sort(hashes)
    if not (ordered[1:] == ordered[:-1]).any():
        return 0
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    repeated = order[1:][ordered[1:] == ordered[:-1]]
    steps = np.zeros(len(grams.ends), dtype=np.int64)
    steps[repeated] += 1
    steps[repeated + n] -= 1
    return int(grams.chars[np.cumsum(steps[:-1]) > 0].sum())


def _repeated_chars(grams: _Ngrams, n: int) -> int:
    """Characters in n-grams that occurred before, read from left to right: one that repeats is jumped over whole."""
    seen: set[int] = set()
    hashes, lengths = grams.hashes(n).tolist(), grams.lengths(n).tolist()
    chars, i = 0, 0
    while i < len(hashes):
        if hashes[i] in seen:
            chars += lengths[i]
            i += n
        else:
            seen.add(hashes[i])
            i += 1
    return chars
