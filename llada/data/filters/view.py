"""One document as the filters see it: split into lines and words once, shared by all of them."""

from __future__ import annotations

from functools import cached_property
from itertools import chain

import numpy as np

from llada.data.document import UNKNOWN
from llada.data.filters.words import LATIN, NO_LETTER, UNSEGMENTED, encode_words


class TextView:
    """A text with its lines and words, each computed on first use."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def lines(self) -> list[str]:
        """The lines, without their line breaks (any kind that Unicode knows)."""
        return self.text.splitlines()

    @cached_property
    def line_pieces(self) -> list[list[str]]:
        """Each line cut at white space."""
        return [line.split() for line in self.lines]

    @cached_property
    def pieces(self) -> list[str]:
        """The text cut at white space. Each piece holds at least one word."""
        return list(chain.from_iterable(self.line_pieces))

    @cached_property
    def words(self) -> np.ndarray:
        """WORD (words,): the words, punctuation marks included; see llada.data.filters.words."""
        return encode_words(self.pieces)

    @cached_property
    def script(self) -> int:
        """The script of most words that have letters: LATIN, UNSEGMENTED, OTHER_SCRIPT, or NO_LETTER if none has."""
        if self.text.isascii():
            return LATIN
        counts = np.bincount(self.words["script"], minlength=4)
        counts[NO_LETTER] = 0
        return int(counts.argmax()) if counts.any() else NO_LETTER

    @property
    def is_unsegmented(self) -> bool:
        """Whether most words are characters of a script without spaces: Chinese, Japanese, Thai…"""
        return self.script == UNSEGMENTED

    def is_english(self, language: str) -> bool:
        """Whether rules made for English apply: the language is English ("en", "eng_Latn"), or unknown and in Latin
        letters (or none)."""
        if language == UNKNOWN:
            return self.script in (LATIN, NO_LETTER)
        return language.lower().replace("_", "-").split("-")[0] in ("en", "eng")
