"""MinHash signatures of documents and the band keys by which near-duplicates meet (Broder 1997; LSH banding).

Two documents whose sets of word n-grams have Jaccard similarity s agree in each hash of their signatures with
probability s, hence share at least one of the band keys with probability 1 - (1 - s^rows)^bands. The defaults are
FineWeb's: 5-grams, 14 bands of 8 hashes, so s = 0.8 gives 0.92 and s = 0.5 gives 0.05.

FineWeb's hash family is h(x) = (a x + b mod 2^64) mod (2^61 - 1) on 64-bit shingles. Here it is a x + b mod 2^32
with odd a on well-mixed 32-bit shingles: the same curve (measured), a fifth of the time.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import chain

import numpy as np

from llada.data.batching import batches
from llada.mixing import GOLDEN_GAMMA, mix64

_DIGITS = re.compile(r"\d+")
_WORD = re.compile(r"[^\W_]+")
_LATIN_MARK = re.compile("[\u0300-\u036f]+")
_OTHER_SCRIPT = re.compile("[\u0370-\u1fff\u2070-\U0010ffff]")
_CHUNK = 1 << 16  # shingles hashed at once: 256 KB, which stays in the cache
_MAX_KNOWN_WORDS = 1 << 20
# Scripts written without spaces, where each character counts as a word: Thai, Lao, Myanmar, Khmer, kana, Bopomofo, Han.
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x312F), (0x31A0, 0x31BF),
    (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip


class _CharacterMap(dict[int, str | None]):
    """What becomes of a character, for `str.translate`; decided when it is first met."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Mn":  # a combining mark
            result = None
        elif any(first <= code <= last for first, last in _UNSPACED):
            result = f" {character} " if character.isalnum() else " "
        else:
            result = character if character.isalnum() or category == "Mc" else " "
        self[code] = result
        return result


class _NumberBlindHashes(dict[str, int]):
    """The 64-bit hash of each word, all numbers alike; a word is hashed when it is first met."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_KNOWN_WORDS:
            self.clear()
        # half of a surrogate pair has no UTF-8: it may be hashed all the same
        folded = _DIGITS.sub("0", word).encode("utf-8", "surrogatepass")
        digest = blake2b(folded, digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


_characters = _CharacterMap()


def comparison_words(text: str) -> list[str]:
    """The words by which documents are compared: lower case, without diacritics; what is neither letter nor digit
    separates; in scripts without spaces every character is a word."""
    text = text.lower()
    if not text.isascii():
        text = unicodedata.normalize("NFD", text)
        if not _OTHER_SCRIPT.search(text):  # the same result, three times as fast
            return _WORD.findall(_LATIN_MARK.sub("", text))
    return text.translate(_characters).split()


class MinHasher:
    """Signatures of bands x rows 32-bit hashes over word n-grams. Equal settings give equal signatures anywhere."""

    def __init__(self, ngram: int = 5, bands: int = 14, rows: int = 8, seed: int = 1) -> None:
        self.ngram, self.bands, self.rows, self.seed = ngram, bands, rows, seed
        self._word_hashes = _NumberBlindHashes()
        start = mix64(np.array([seed], dtype=np.uint64) + np.uint64(GOLDEN_GAMMA))
        stream = mix64(start + np.arange(2 * bands * rows + bands, dtype=np.uint64))
        multipliers, offsets, self._band_salts = np.split(stream, [bands * rows, 2 * bands * rows])
        self._multipliers = (multipliers >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
        self._offsets = (offsets >> np.uint64(32)).astype(np.uint32)

    def signatures(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """(signatures uint32 (V, bands * rows), positions int64 (V,)) of the V texts with at least `ngram` words."""
        signatures = [np.empty((0, self.bands * self.rows), np.uint32)]
        positions = [np.empty(0, np.int64)]
        done = 0
        for batch in batches(texts, len):
            words = [comparison_words(text) for text in batch]
            shingles, lengths = self._shingles(words)
            signatures.append(self._minima(shingles, lengths[lengths > 0]))
            positions.append(np.flatnonzero(lengths) + done)
            done += len(batch)
        return np.concatenate(signatures), np.concatenate(positions)

    def band_keys(self, signatures: np.ndarray) -> np.ndarray:
        """uint64 (V, bands) of signatures (V, bands * rows): a hash of the band's number and its hashes.

        10^10 documents have about 10^11 keys, among which some hundred pairs are equal by chance.
        """
        hashes = signatures.reshape(-1, self.bands, self.rows)
        keys = np.broadcast_to(self._band_salts, hashes.shape[:2])
        for row in range(self.rows):
            keys = mix64(keys ^ hashes[:, :, row])
        return keys

    def _shingles(self, documents: Sequence[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """(uint32 hashes of all word n-grams, document by document; how many each document has)."""
        counts = np.array([len(words) for words in documents], dtype=np.int64)
        hashes = map(self._word_hashes.__getitem__, chain.from_iterable(documents))
        words = np.fromiter(hashes, dtype=np.uint64, count=int(counts.sum()))
        rolled = np.zeros(max(0, len(words) - self.ngram + 1), dtype=np.uint64)
        for place in range(self.ngram):  # a polynomial in the words, so that their order counts
            rolled = rolled * np.uint64(GOLDEN_GAMMA) + words[place : place + len(rolled)]
        lengths = np.maximum(counts - self.ngram + 1, 0)
        ends = np.cumsum(counts)
        # An n-gram must not begin in the last ngram - 1 words of a document.
        inside = np.ones(len(words), dtype=bool)
        for back in range(1, self.ngram):
            inside[ends[counts >= back] - back] = False
        return (mix64(rolled[inside[: len(rolled)]]) >> np.uint64(32)).astype(np.uint32), lengths

    def _minima(self, shingles: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The smallest value of each hash over each document's shingles: uint32 (V, bands * rows)."""
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else np.empty(0, np.int64)
        minima = np.full((len(self._multipliers), len(lengths)), 0xFFFFFFFF, dtype=np.uint32)
        for begin in range(0, len(shingles), _CHUNK):
            chunk = shingles[begin : begin + _CHUNK]
            # The first document may have begun in the chunk before.
            first = int(np.searchsorted(starts, begin, side="right")) - 1
            last = int(np.searchsorted(starts, begin + len(chunk)))
            places = np.maximum(starts[first:last] - begin, 0)
            hashed = np.empty_like(chunk)
            for number, (a, b) in enumerate(zip(self._multipliers, self._offsets, strict=True)):
                np.multiply(chunk, a, out=hashed)
                np.add(hashed, b, out=hashed)
                best = minima[number, first:last]
                np.minimum(best, np.minimum.reduceat(hashed, places), out=best)
        return minima.T
