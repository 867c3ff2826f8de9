"""Block lists for the URLs of documents, as RefinedWeb and FineWeb use them: domains, pages, and words in the URL.

The lists are the user's own: text files at any fsspec URL (.gz too), one entry a line, lines starting with # ignored.
Entries are held as sorted 64-bit hashes: 8 bytes each, and for a list of ten million one URL in 10^12 is refused by
mistake.
"""

from __future__ import annotations

import contextlib
import functools
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from llada.data.document import Document
from llada.data.filters.filter import Filter, Filtered, Verdict
from llada.data.filters.view import TextView
from llada.errors import UserError
from llada.files import open_text
from llada.settings import check_limits, limited

_URL = re.compile(
    r"\s*(?:(?:[a-z][a-z0-9+.-]*:)?//)?(?:[^/?#@]*@)?"  # scheme and user
    r"(?P<host>\[[^\]/]*\]|[^/?#:]*)(?P<port>:\d*)?(?P<rest>[^#]*)",
    re.IGNORECASE | re.DOTALL,
)
_NOT_WORD = re.compile(r"[^a-z0-9]+")
_PATH_END = re.compile(r"[/?&]")


@dataclass(frozen=True)
class UrlFilter(Filter):
    """URLs of the list files; an empty tuple switches a rule off. Documents without a URL pass."""

    domains: tuple[str, ...] = ()
    """Blocked with everything below them: example.com stops a.example.com."""
    pages: tuple[str, ...] = ()
    """A page, or a folder with everything below it: example.com/~joe."""
    banned_words: tuple[str, ...] = ()
    """One of them as a whole word of the URL is enough."""
    soft_words: tuple[str, ...] = ()
    """`soft_word_threshold` different ones are needed."""
    banned_subwords: tuple[str, ...] = ()
    """Anywhere in the URL's letters and digits, across word limits."""
    soft_word_threshold: int = limited(2, low=1)

    label: ClassVar = "URL lists"
    reasons: ClassVar = MappingProxyType(
        {
            "url.domain": "its domain, or one above it, is in `domains`",
            "url.page": "the page, or a folder above it, is in `pages`",
            "url.banned_word": "a word of the URL is in `banned_words`",
            "url.soft_words": "`soft_word_threshold` words of the URL are in `soft_words`",
            "url.banned_subword": "the URL holds one of `banned_subwords`",
        }
    )

    def __post_init__(self) -> None:
        check_limits(self, "url")

    def __call__(self, document: Document, view: TextView) -> Filtered:
        return Filtered(document, _load(self).verdict(document.url) if document.url else None)

    def files(self) -> list[str]:
        lists = (self.domains, self.pages, self.banned_words, self.soft_words, self.banned_subwords)
        return [url for urls in lists for url in urls]


class UrlLists:
    """The lists of a `UrlFilter`, read once. Raises UserError naming the list."""

    def __init__(self, settings: UrlFilter) -> None:
        self._domains = _HashSet(_domain(entry) for entry in _entries(settings.domains))
        self._pages = _HashSet("".join(_split(entry)) for entry in _entries(settings.pages))
        self._banned_words = _words(_entries(settings.banned_words))
        self._soft_words = _words(_entries(settings.soft_words))
        subwords = sorted(_words(_entries(settings.banned_subwords)))
        self._banned_subwords = re.compile("|".join(subwords)) if subwords else None
        self._soft_word_threshold = settings.soft_word_threshold

    def verdict(self, url: str) -> Verdict | None:
        """Why documents of this URL are refused, with what was found as the value, or None."""
        host, rest = _split(url)
        if domain := self._domains.first(_parents(host)):
            return Verdict("url.domain", domain)
        if page := self._pages.first(_beginnings(host, rest)):
            return Verdict("url.page", page)
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


_load = functools.cache(UrlLists)


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
            with open_text(url) as lines:
                for line in lines:
                    if (entry := line.strip()) and not entry.startswith("#"):
                        yield entry
        except UnicodeDecodeError as error:
            raise UserError(
                f"the URL list {url} is not UTF-8 text ({error}): give one entry a line"
            ) from None
        except FileNotFoundError:
            raise UserError(f"no URL list at {url}: give the file of a list, or leave it out") from None


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
