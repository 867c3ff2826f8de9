"""Find evaluation questions in training text: word n-grams that stand in both (GPT-3 and Llama: 13 words).

Words are those of llada.data.dedup.minhash, after Unicode's NFKC: lower case, no diacritics, no punctuation, and a character
each in scripts without spaces, so 13 characters of a Chinese question match, in traditional characters as in
simplified ones. Numbers count as they are: the question with other numbers is another question. A row of an evaluation
file is read as one text, its strings in order, so a question followed by its answer matches as well. A short question
stands in no `ngram` words without the id or source beside it: so every string, and every few neighbouring ones, of
fewer than `ngram` words are looked for as a whole, if they have `min_words`.

The index is one safetensors file, made once and read by every worker:
    hashes uint64 (H,), sorted within each size · sizes, counts (S,): H hashes of S sizes, in words ·
    owners uint32 (H,): the row of each hash, with files, lines uint32 (R,) of the rows; the files' names, and how much
    of them can be found, in its metadata
"""

from __future__ import annotations

import functools
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypedDict

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from llada.data.batching import batches
from llada.data.dedup.minhash import comparison_words
from llada.data.document import Document
from llada.data.filters.filter import Filter, Filtered, Verdict
from llada.data.filters.view import TextView
from llada.data.left_out import FilesLeftOut, added, summary
from llada.data.outcomes import EvaluationMatch, Rejects
from llada.data.read.fields import MISSING, field_of
from llada.data.read.formats import read_records
from llada.data.read.listing import list_inputs
from llada.data.read.parts import InputFile, Part, Record
from llada.errors import UserError
from llada.files import read_bytes, safetensors_layout, storage_errors, write_bytes
from llada.mixing import GOLDEN_GAMMA
from llada.settings import check_limits, limited, require
from llada.store_errors import StoreError

_log = logging.getLogger(__name__)

FORMAT = "llada-decontamination-2"
_MAX_KNOWN_WORDS = 1 << 20
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_SIEVE_BITS = (16, 24)  # 64 KB to 16 MB
_WORDS_AT_ONCE = 1 << 14  # their hashes stay in the cache


@dataclass(frozen=True)
class DecontaminationConfig:
    """Which evaluation rows must not stand in the data."""

    files: tuple[str, ...] = ()
    """Files, folders, globs or "@" lists of evaluation sets, in any format that is read, at any URL."""
    ngram: int = limited(13, low=1)
    """Words in a row that make a match."""
    min_words: int = limited(8, low=1)
    """Strings of min_words to ngram - 1 words are looked for as a whole; shorter ones are left out: they are chance."""
    fields: tuple[str, ...] | None = None
    """Fields that make a row's text, in this order, "a.b" for field b of a; None takes every string in it."""
    fold_chinese: bool = True
    """Compare Chinese characters by their simplified form. Needs the package opencc when there are any."""

    def __post_init__(self) -> None:
        check_limits(self, "decontamination")
        require(
            self.min_words <= self.ngram,
            f"decontamination: min_words={self.min_words} must lie between 1 and ngram={self.ngram}",
        )


class Match(NamedTuple):
    """The first place in a text that also stands in an evaluation row."""

    file: str
    line: int
    """Of the row, from 1."""
    words: str
    """All matched words in a row, normalised."""
    ngrams: int
    """Matched n-grams in the whole text: few when it is a chance, many when a question was copied."""


class Coverage(TypedDict):
    """How much of one evaluation file can be found."""

    file: str
    rows: int
    """Of the file."""
    found_rows: int
    """Those with an n-gram in the index."""
    fields: int
    """Strings of the rows."""
    found_fields: int
    """Those that are found by themselves, without what stands beside them."""


def coverage_problem(coverage: Sequence[Coverage], min_words: int) -> str | None:
    """What is not looked for of the evaluation sets, and what to do; None when all of it is."""
    rows, found = (sum(each[key] for each in coverage) for key in ("rows", "found_rows"))
    if found == rows and rows:
        return None
    worst = max(coverage, key=lambda each: each["rows"] - each["found_rows"], default=None)
    where = (
        f"{worst['file']}" + (f" and {len(coverage) - 1:,} others" if len(coverage) > 1 else "")
        if worst
        else ""
    )
    if not rows:
        return f"nothing was looked for in the data: there is no evaluation row in {where or 'the evaluation files'}"
    remedy = f"they are shorter than min_words={min_words}; lower decontamination.min_words to look for them"
    if not found:
        return f"nothing was looked for in the data: none of the {rows:,} evaluation rows of {where} can be found, {remedy}"
    return f"{rows - found:,} of {rows:,} evaluation rows of {where} are not looked for: {remedy}"


class _WordHashes(dict[str, int]):
    """The 64-bit hash of each word, the same in every process."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_KNOWN_WORDS:
            self.clear()
        digest = blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


class _Table(NamedTuple):
    """The n-grams of one size: hashes uint64 (H,), sorted, and the row uint32 (H,) of each."""

    hashes: np.ndarray
    owners: np.ndarray
    sieve: np.ndarray  # bool (2^bits,): whether a hash begins with these bits; few of a text's n-grams pass

    @classmethod
    def of(cls, hashes: np.ndarray, owners: np.ndarray) -> _Table:
        bits = min(max((16 * len(hashes)).bit_length(), _SIEVE_BITS[0]), _SIEVE_BITS[1])
        sieve = np.zeros(1 << bits, dtype=bool)
        sieve[hashes >> np.uint64(64 - bits)] = True
        return cls(hashes, owners, sieve)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions (M,) in `hashes` that are in the table, the row of each)."""
        leading = hashes >> np.uint64(65 - len(self.sieve).bit_length())
        maybe = np.flatnonzero(self.sieve.take(leading.view(np.int64)))
        if not len(maybe):
            return maybe, self.owners[:0]
        nearest = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
        hit = self.hashes[nearest] == hashes[maybe]
        return maybe[hit], self.owners[nearest[hit]]


class DecontaminationIndex:
    """The n-grams of evaluation rows, by their size in words, the longest first; `build_index` makes one."""

    def __init__(
        self,
        coverage: list[Coverage],
        files: np.ndarray,
        lines: np.ndarray,
        ngrams: dict[int, tuple[np.ndarray, np.ndarray]],
        fold_chinese: bool,
    ) -> None:
        self.coverage, self._files, self._lines, self._fold = coverage, files, lines, fold_chinese
        self._tables = {size: _Table.of(*ngrams[size]) for size in sorted(ngrams, reverse=True)}
        self._hasher = _NgramHasher()

    @property
    def rows(self) -> int:
        """Evaluation rows that can be found."""
        return len(self._lines)

    def match(self, text: str) -> Match | None:
        """The first place of `text` that an evaluation row holds too, or None."""
        return self.match_all([text])[0]

    def match_all(self, texts: Iterable[str]) -> list[Match | None]:
        """`match` of each text; of short ones much faster than one by one."""
        results: list[Match | None] = []
        documents = (_words(text, self._fold) for text in texts)
        for group in batches(documents, len, _WORDS_AT_ONCE):
            results += self._match_group(group)
        return results

    def _match_group(self, documents: list[list[str]]) -> list[Match | None]:
        matches: list[Match | None] = [None] * len(documents)
        ends = np.cumsum([len(words) for words in documents], dtype=np.int64)
        hashes = self._hasher.of_words([word for words in documents for word in words])
        for size, table in self._tables.items():
            positions, owners = table.find(hashes.ngrams(size))
            if not len(positions):
                continue
            number = np.searchsorted(ends, positions, side="right")
            inside = positions + size <= ends[number]
            positions, owners, number = positions[inside], owners[inside], number[inside]
            for document in np.unique(number).tolist():
                if matches[document] is None:
                    own = number == document
                    words, start = documents[document], int(ends[document]) - len(documents[document])
                    matches[document] = self._describe(
                        words, positions[own] - start, size, int(owners[own][0])
                    )
        return matches

    def _describe(self, words: list[str], positions: np.ndarray, size: int, owner: int) -> Match:
        gaps = np.flatnonzero(np.diff(positions) > 1)
        last = int(positions[gaps[0] if len(gaps) else -1])
        run = " ".join(words[int(positions[0]) : last + size])
        return Match(
            self.coverage[int(self._files[owner])]["file"], int(self._lines[owner]), run, len(positions)
        )

    def save(self, url: str) -> None:
        """Write the index as one file. Equal evaluation files and settings give equal bytes."""
        tables = self._tables.values()
        arrays = {
            "hashes": np.concatenate([np.empty(0, np.uint64), *(t.hashes for t in tables)]),
            "owners": np.concatenate([np.empty(0, np.uint32), *(t.owners for t in tables)]),
            "sizes": np.array(list(self._tables), dtype=np.uint32),
            "counts": np.array([len(t.hashes) for t in tables], dtype=np.uint64),
            "files": self._files,
            "lines": self._lines,
        }
        # Several metadata entries would stand in an order that changes from run to run.
        described = json.dumps({"format": FORMAT, "coverage": self.coverage, "fold_chinese": self._fold})
        write_bytes(url, save(arrays, metadata={"index": described}))

    @classmethod
    def load(cls, url: str) -> DecontaminationIndex:
        """Read what `save` wrote. Raises UserError naming a file that is missing, foreign or damaged."""
        try:
            arrays = load(data := read_bytes(url))
            described = json.loads(safetensors_layout(data)[0]["index"])
            if described["format"] != FORMAT:
                raise ValueError
        except FileNotFoundError:
            raise UserError(f"no decontamination index at {url}; build it again") from None
        except StoreError:
            raise
        except (SafetensorError, ValueError, KeyError):
            raise UserError(f"{url} is no {FORMAT} file or is damaged; build it again") from None
        ends = np.cumsum(arrays["counts"]).tolist()
        ngrams = {
            size: (arrays["hashes"][start:end], arrays["owners"][start:end])
            for size, start, end in zip(arrays["sizes"].tolist(), [0, *ends], ends, strict=False)
        }
        return cls(described["coverage"], arrays["files"], arrays["lines"], ngrams, described["fold_chinese"])


@dataclass(frozen=True)
class Decontamination(Filter):
    """The last filter of a chain: refuses documents that hold an evaluation row, and notes where in `matches`."""

    index: DecontaminationIndex
    matches: list[EvaluationMatch]

    label: ClassVar = "Decontamination"
    reasons: ClassVar = MappingProxyType({"contaminated": "an n-gram of an evaluation row stands in it"})

    def __call__(self, document: Document, view: TextView) -> Filtered:
        if (match := self.index.match(document.text)) is None:
            return Filtered(document)
        self.matches.append(
            {"place": document.place, "file": match.file, "line": match.line, "words": match.words}
        )
        return Filtered(document, Verdict("contaminated", match.words))


def build_index(config: DecontaminationConfig) -> DecontaminationIndex:
    """The index of all evaluation rows; where several rows hold an n-gram, the first one is named.

    Raises UserError for a missing file, and for a row that cannot be read or lacks one of `fields`: a question that is
    not in the index would stay in the data unnoticed.
    """
    hasher = _NgramHasher()
    unlisted: FilesLeftOut = {}  # which fills while the files come
    unused: FilesLeftOut = {}
    coverage: list[Coverage] = []
    rows: list[tuple[int, int]] = []
    pieces_of: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for number, file in enumerate(list_inputs(config.files, left_out=unlisted) if config.files else ()):
        rejects = Rejects()
        covered: Coverage = {"file": file.url, "rows": 0, "found_rows": 0, "fields": 0, "found_fields": 0}
        coverage.append(covered)
        for record in _evaluation_rows(file, rejects):
            strings = _strings(record.fields, config.fields, f"{file.url}:{record.line}")
            fields = [words for text in strings if (words := _words(text, config.fold_chinese))]
            covered["rows"] += 1
            covered["fields"] += len(fields)
            covered["found_fields"] += sum(len(words) >= config.min_words for words in fields)
            wanted = list(_wanted(fields, config))
            for words in wanted:
                size = min(config.ngram, len(words))
                hashes = hasher.of_words(words).ngrams(size)
                owner = np.full(len(hashes), len(rows), dtype=np.uint32)
                pieces_of.setdefault(size, []).append((hashes, owner))
            if wanted:
                covered["found_rows"] += 1
                rows.append((number, record.line))
        if rejects.counts:
            raise UserError(
                f"evaluation file {file.url}: cannot read {rejects.counts.total()} rows "
                f"({', '.join(rejects.counts)}); mend the file or leave it out"
            )
        unused = added(unused, rejects.left_out)
    if left_out := added(unlisted, unused):
        _log.warning("left out of the evaluation sets: %s", summary(left_out))
    ngrams = {}
    for size, pieces in pieces_of.items():
        hashes, owners = (np.concatenate(column) for column in zip(*pieces, strict=True))
        unique, first = np.unique(hashes, return_index=True)
        ngrams[size] = (unique, owners[first])
    places = np.array(rows, dtype=np.uint32).reshape(-1, 2)
    return DecontaminationIndex(
        coverage, places[:, 0].copy(), places[:, 1].copy(), ngrams, config.fold_chinese
    )


def _evaluation_rows(file: InputFile, rejects: Rejects) -> Iterator[Record]:
    with storage_errors(file.url):
        yield from read_records(Part(file, file.size or 0), rejects)


def _wanted(fields: list[list[str]], config: DecontaminationConfig) -> Iterator[list[str]]:
    """The words whose n-grams stand for a row: all of it, and each run of neighbouring fields that is shorter than an
    n-gram, which no n-gram of the whole row would find where the run stands alone."""
    whole = [word for words in fields for word in words]
    if len(whole) >= config.ngram:
        yield whole
    for first in range(len(fields)):
        run: list[str] = []
        for words in fields[first:]:
            run = run + words
            if len(run) >= config.ngram:
                break
            if len(run) >= config.min_words:
                yield run


def _words(text: str, fold_chinese: bool) -> list[str]:
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        if fold_chinese and _CHINESE.search(text):
            text = text.translate(_simplified)
    return comparison_words(text)


class _Simplified(dict[int, str]):
    """The simplified form of a character, for `str.translate`; looked up when it is first met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = _converter().convert(character) if _CHINESE.match(character) else character
        return self[code]


@functools.cache
def _converter() -> Any:
    try:
        import opencc
    except ImportError:
        raise UserError(
            "comparing Chinese text needs the package opencc: pip install opencc, or set fold_chinese to false"
        ) from None
    return opencc.OpenCC("t2s")


_simplified = _Simplified()


def _strings(row: dict[str, Any], fields: tuple[str, ...] | None, place: str) -> Iterator[str]:
    """The strings that make a row's text."""
    if fields is None:
        yield from _strings_in(list(row.values()))
        return
    for name in fields:
        if (value := field_of(row, name)) is MISSING:
            raise UserError(f"evaluation row {place} has no field {name!r}; it has {', '.join(row)}")
        yield from _strings_in(value)


def _strings_in(value: Any) -> Iterator[str]:
    """Every string in a JSON value, in order; of an object {text: number} (answers and their labels) the texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, int | float):
                yield key
            yield from _strings_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings_in(inner)


class _NgramHasher:
    """Polynomial hashes of word n-grams from prefix sums: a few operations a word, whatever n is.

    With word hashes w and a multiplier b, modulo 2^64, the n-gram at i has b^-i (P[i + n] - P[i]), P[i] = sum w_j b^j
    for j < i; that is the sum of w_(i + k) b^k for k < n, the same wherever it stands.
    """

    def __init__(self) -> None:
        self._word_hashes = _WordHashes()
        self._grow(2 * _WORDS_AT_ONCE)

    def _grow(self, size: int) -> None:
        # The multiplier is odd, so it has an inverse modulo 2^64.
        factors = np.full((2, size), [[GOLDEN_GAMMA], [pow(GOLDEN_GAMMA, -1, 1 << 64)]], dtype=np.uint64)
        factors[:, 0] = 1
        self._powers, self._inverse_powers = np.cumprod(factors, axis=1, dtype=np.uint64)

    def of_words(self, words: list[str]) -> _PrefixSums:
        if len(words) > len(self._powers):
            self._grow(2 * len(words))
        hashes = np.fromiter(map(self._word_hashes.__getitem__, words), dtype=np.uint64, count=len(words))
        sums = np.zeros(len(words) + 1, dtype=np.uint64)
        np.cumsum(hashes * self._powers[: len(words)], out=sums[1:])
        return _PrefixSums(sums, self._inverse_powers)


class _PrefixSums(NamedTuple):
    sums: np.ndarray  # uint64 (words + 1,)
    inverse_powers: np.ndarray  # uint64, at least as long

    def ngrams(self, size: int) -> np.ndarray:
        """The hash of the n-gram at each word that begins one, uint64 (max(0, words - size + 1),)."""
        count = max(0, len(self.sums) - size)
        return (self.sums[size:] - self.sums[:count]) * self.inverse_powers[:count]
