"""Block lists for the URLs of documents, as RefinedWeb and FineWeb use them: domains, pages, and words in the URL.

The lists are the user's own: text files at any fsspec URL (.gz too), one entry a line, lines starting with # ignored.
Entries are held as sorted 64-bit hashes: 8 bytes each, and for a list of ten million one URL in 10^12 is refused by
mistake.
"""

from __future__ import annotations

import contextlib
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import fsspec
import numpy as np

from llada.data.filters.view import Verdict

_URL = re.compile(
    r"\s*(?:(?:[a-z][a-z0-9+.-]*:)?//)?(?:[^/?#@]*@)?"  # scheme and user
    r"(?P<host>\[[^\]/]*\]|[^/?#:]*)(?P<port>:\d*)?(?P<rest>[^#]*)",
    re.IGNORECASE | re.DOTALL,
)
_NOT_WORD = re.compile(r"[^a-z0-9]+")
_PATH_END = re.compile(r"[/?&]")


@dataclass(frozen=True)
class UrlConfig:
    """URLs of the list files; an empty tuple switches a rule off."""

    domains: tuple[str, ...] = ()  # blocked with everything below them: example.com stops a.example.com
    pages: tuple[str, ...] = ()  # a page, or a folder with everything below it: example.com/~joe
    banned_words: tuple[str, ...] = ()  # one of them as a whole word of the URL is enough
    soft_words: tuple[str, ...] = ()  # `soft_word_threshold` different ones are needed
    banned_subwords: tuple[str, ...] = ()  # anywhere in the URL's letters and digits, across word limits
    soft_word_threshold: int = 2

    def __post_init__(self) -> None:
        if self.soft_word_threshold < 1:
            raise ValueError(f"soft_word_threshold must be at least 1, not {self.soft_word_threshold}")


class UrlFilter:
    """The lists of a `UrlConfig`, read once. Raises FileNotFoundError or ValueError naming the list."""

    def __init__(self, config: UrlConfig) -> None:
        self._domains = _HashSet(_domain(entry) for entry in _entries(config.domains))
        self._pages = _HashSet("".join(_split(entry)) for entry in _entries(config.pages))
        self._banned_words = _words(_entries(config.banned_words))
        self._soft_words = _words(_entries(config.soft_words))
        subwords = sorted(_words(_entries(config.banned_subwords)))
        self._banned_subwords = re.compile("|".join(subwords)) if subwords else None
        self._soft_word_threshold = config.soft_word_threshold

    def verdict(self, url: str) -> Verdict | None:
        """Why documents of this URL are refused, with what was found as the value, or None."""
        host, rest = _split(url)
        if found := self._domains.first(_parents(host)):
            return Verdict("url.domain", found)
        if found := self._pages.first(_beginnings(host, rest)):
            return Verdict("url.page", found)
        if not (self._banned_words or self._soft_words or self._banned_subwords):
            return None
        words = _NOT_WORD.split(url.lower())
        if banned := self._banned_words.intersection(words):
            return Verdict("url.banned_word", min(banned))
        soft = self._soft_words.intersection(words)
        if len(soft) >= self._soft_word_threshold:
            return Verdict("url.soft_words", " ".join(sorted(soft)), self._soft_word_threshold)
        if self._banned_subwords and (match := self._banned_subwords.search("".join(words))):
            return Verdict("url.banned_subword", match[0])
        return None


def _split(url: str) -> tuple[str, str]:
    """(host, path and query): lower case where case means nothing, without scheme, user, port, fragment, final slash."""
    match = _URL.match(url)
    assert match is not None  # every part may be empty
    return _domain(match["host"]), match["rest"].strip().rstrip("/")


def _domain(name: str) -> str:
    """A host name in lower case and, where it is written in another script, in its ASCII form (punycode)."""
    name = name.strip().strip(".").lower()
    if not name.isascii():
        with contextlib.suppress(UnicodeError):  # no valid name can still equal an entry
            name = name.encode("idna").decode("ascii")
    return name.removeprefix("www.")


def _parents(host: str) -> list[str]:
    """a.b.c -> a.b.c, b.c, c"""
    labels = host.split(".")
    return [".".join(labels[i:]) for i in range(len(labels))]


def _beginnings(host: str, rest: str) -> list[str]:
    """The page and the folders it lies in: x.y/a/b?q -> x.y/a, x.y/a/b, x.y/a/b?q; x.y alone is the page at its root."""
    return [host + rest[: end.start()] for end in _PATH_END.finditer(rest, 1)] + [host + rest]


def _words(entries: Iterable[str]) -> frozenset[str]:
    """The entries' letters and digits."""
    return frozenset(_NOT_WORD.sub("", entry.lower()) for entry in entries) - {""}


def _entries(urls: tuple[str, ...]) -> Iterator[str]:
    for url in urls:
        try:
            with fsspec.open(url, "rt", encoding="utf-8", compression="infer") as lines:
                for line in lines:
                    if (entry := line.strip()) and not entry.startswith("#"):
                        yield entry
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the URL list {url} is not UTF-8 text ({error}): give one entry a line"
            ) from None


class _HashSet:
    """Strings one can ask for, without keeping them."""

    def __init__(self, entries: Iterator[str]) -> None:
        unsorted = array("Q", (_hash(entry) for entry in entries))
        self._sorted = array("Q", np.unique(np.frombuffer(unsorted, dtype=np.uint64)).tobytes())

    def first(self, candidates: list[str]) -> str | None:
        """The first of the candidates that is in the set."""
        for candidate in candidates if self._sorted else ():
            wanted = _hash(candidate)
            place = bisect_left(self._sorted, wanted)
            if place < len(self._sorted) and self._sorted[place] == wanted:
                return candidate
        return None


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
