"""Heuristic quality filters with their published limits: Gopher, C4 and FineWeb.

    GopherQuality    Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1
    C4Quality        Raffel et al. 2019 (arXiv 1910.10683), section 2.2; it also REWRITES the text
    FineWebQuality   Penedo et al. 2024 (arXiv 2406.17557), section 3.6

Limits, order and details are those of datatrove, which made FineWeb. The limits were set for English. So that other
languages survive them, rules that presuppose English (its function words, its word lengths) apply to English alone,
and texts in scripts without spaces, where a word is one character, have limits of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from llada.data.document import UNKNOWN, Document
from llada.data.filters.filter import Filter, Filtered, Verdict
from llada.data.filters.repetition import duplicate_chars
from llada.data.filters.view import TextView
from llada.data.filters.words import (
    NO_LETTER,
    PUNCTUATION,
    SENTENCE_END,
    SENTENCE_ENDS,
    encode_words,
    split_words,
)

# --- Gopher -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GopherQuality(Filter):
    """What a document must have; None switches a rule off. "Words" are those with more than punctuation, unless said."""

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_chars: float | None = 3
    """Mean characters of a word, English."""
    max_mean_word_chars: float | None = 10
    min_mean_word_chars_other: float | None = 2
    """The same for other languages with spaces between words: Korean words are shorter,"""
    max_mean_word_chars_other: float | None = 20
    """and those of agglutinative languages much longer."""
    max_symbol_ratio: float | None = 0.1
    """Number signs, and likewise ellipses, per word or punctuation mark."""
    max_bullet_lines: float | None = 0.9
    """Share of the lines that begin with a bullet or a hyphen."""
    max_ellipsis_lines: float | None = 0.3
    """Share of the lines that end with an ellipsis."""
    min_words_with_letter: float | None = 0.8
    """Share of all words and punctuation marks."""
    min_words_with_letter_other: float | None = 0.6
    """The same for other languages: where a character is a word, or an apostrophe a letter, marks are more frequent."""
    min_stop_words: int | None = 2
    """How many different ones of `stop_words` must occur, English."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    label: ClassVar = "Gopher quality"
    reasons: ClassVar = MappingProxyType(
        {
            "gopher_quality.few_words": "fewer than `min_words`",
            "gopher_quality.many_words": "more than `max_words`",
            "gopher_quality.short_words": "mean length below `min_mean_word_chars`",
            "gopher_quality.long_words": "mean length above `max_mean_word_chars`",
            "gopher_quality.hashes": "more number signs than `max_symbol_ratio`",
            "gopher_quality.ellipses": "more ellipses than `max_symbol_ratio`",
            "gopher_quality.bullet_lines": "more lines with a bullet than `max_bullet_lines`",
            "gopher_quality.ellipsis_lines": "more lines that end with an ellipsis than `max_ellipsis_lines`",
            "gopher_quality.words_without_letters": "fewer words with a letter than `min_words_with_letter`",
            "gopher_quality.stop_words": "fewer of `stop_words` than `min_stop_words`",
        }
    )

    def __call__(self, document: Document, view: TextView) -> Filtered:
        return Filtered(document, self.verdict(view, document.language))

    def verdict(self, view: TextView, language: str = UNKNOWN) -> Verdict | None:
        """The first rule that a text fails, or None. `language`: an ISO 639 code ("en", "zho", "kor_Hang")."""
        text, words, lines = view.text, view.words, view.lines
        symbols = words["is_symbol"]
        count = len(words) - int(np.count_nonzero(symbols))
        if self.min_words is not None and count < self.min_words:
            return Verdict("gopher_quality.few_words", count, self.min_words)
        if self.max_words is not None and count > self.max_words:
            return Verdict("gopher_quality.many_words", count, self.max_words)
        if not count:
            return None

        english = view.is_english(language)
        if not view.is_unsegmented:
            mean = (int(words["chars"].sum()) - int(words["chars"][symbols].sum())) / count
            low = self.min_mean_word_chars if english else self.min_mean_word_chars_other
            high = self.max_mean_word_chars if english else self.max_mean_word_chars_other
            if low is not None and mean < low:
                return Verdict("gopher_quality.short_words", mean, low)
            if high is not None and mean > high:
                return Verdict("gopher_quality.long_words", mean, high)

        ellipses = text.count("...") + text.count("…")
        if (limit := self.max_symbol_ratio) is not None:
            for name, found in (("hashes", text.count("#")), ("ellipses", ellipses)):
                if found / len(words) > limit:
                    return Verdict(f"gopher_quality.{name}", found / len(words), limit)
        if (limit := self.max_bullet_lines) is not None:
            possible = text.count("•") + text.count("-")  # most texts have too few to look at their lines
            if possible > limit * len(lines):
                share = sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines)
                if share > limit:
                    return Verdict("gopher_quality.bullet_lines", share, limit)
        if (limit := self.max_ellipsis_lines) is not None and ellipses > limit * len(lines):
            share = sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines)
            if share > limit:
                return Verdict("gopher_quality.ellipsis_lines", share, limit)

        limit = self.min_words_with_letter if english else self.min_words_with_letter_other
        share = np.count_nonzero(words["script"] != NO_LETTER) / len(words)
        if limit is not None and share < limit:
            return Verdict("gopher_quality.words_without_letters", share, limit)
        if self.min_stop_words is not None and english:
            stop_words = frozenset(self.stop_words)
            num_stop_words = len(stop_words.intersection(view.pieces))
            if num_stop_words < self.min_stop_words:  # some may stand beside punctuation
                num_stop_words = len(stop_words.intersection(split_words(text)))
            if num_stop_words < self.min_stop_words:
                return Verdict("gopher_quality.stop_words", num_stop_words, self.min_stop_words)
        return None


# --- C4 ---------------------------------------------------------------------------------------------------------------

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_TERMINAL_PUNCTUATION = (".", "?", "!", '"', "'")
_NOTICES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


@dataclass(frozen=True)
class C4Quality(Filter):
    """What a line, and a document, must have; None or False switches a rule off. The defaults are FineWeb's."""

    max_word_chars: int | None = 1000
    """Lines with a longer word, between white space, are left out."""
    remove_citations: bool = True
    """Take out "[1]", "[edit]" and "[citation needed]"."""
    require_terminal_punctuation: bool = False
    """Leave out lines that do not end in . ? ! or a quotation mark. C4 did; FineWeb found that it removes too much."""
    min_line_words: int | None = 3
    """Lines with fewer words, between white space, are left out. Without spaces, each character is one."""
    refuse_lorem_ipsum: bool = True
    drop_javascript_lines: bool = True
    refuse_curly_brackets: bool = True
    drop_notice_lines: bool = True
    """Leave out lines about cookies, privacy policies and terms of use."""
    min_sentences: int | None = 5

    label: ClassVar = "C4"
    reasons: ClassVar = MappingProxyType(
        {
            "c4_quality.lorem_ipsum": "a line holds it (`refuse_lorem_ipsum`)",
            "c4_quality.curly_bracket": "a line holds one (`refuse_curly_brackets`)",
            "c4_quality.few_sentences": "fewer than `min_sentences` in the lines that are left",
        }
    )

    def __call__(self, document: Document, view: TextView) -> Filtered:
        text, verdict = self.rewrite(view)
        return Filtered(document if text is view.text else replace(document, text=text), verdict)

    def rewrite(self, view: TextView) -> tuple[str, Verdict | None]:
        """The text without its bad lines, and the rule that refuses the document or None.

        A refused text comes back as it was. An unchanged one is the same object: its view can be used on.
        The language does not matter here; the script does.
        """
        # Marks that no line can have need no search line by line. A citation taken out may bring the pieces together.
        lowered = view.text.lower()
        suspicious = "[" in lowered or "lorem ipsum" in lowered or "javascript" in lowered or "{" in lowered
        suspicious = suspicious or any(notice in lowered for notice in _NOTICES)
        unsegmented = view.is_unsegmented
        kept: list[str] = []
        for raw, pieces in zip(view.lines, view.line_pieces, strict=True):
            line = raw.strip()
            count = len(pieces)
            if unsegmented:
                pieces = split_words(line)
                count = len(pieces)
            if (
                (limit := self.max_word_chars) is not None
                and len(line) > limit
                and max(map(len, pieces)) > limit
            ):
                continue
            if suspicious and self.remove_citations:
                line = _CITATION.sub("", line)
            if self.require_terminal_punctuation and (
                not line.endswith(_TERMINAL_PUNCTUATION) or line.endswith("...")
            ):
                continue
            if self.min_line_words is not None and count < self.min_line_words:
                continue
            if suspicious:
                lowered = line.lower()
                if self.refuse_lorem_ipsum and "lorem ipsum" in lowered:
                    return view.text, Verdict("c4_quality.lorem_ipsum", line[:100])
                if self.drop_javascript_lines and "javascript" in lowered:
                    continue
                if self.refuse_curly_brackets and "{" in line:
                    return view.text, Verdict("c4_quality.curly_bracket", line[:100])
                if self.drop_notice_lines and any(notice in lowered for notice in _NOTICES):
                    continue
            kept.append(line)
        if self.min_sentences is not None and len(kept) < self.min_sentences:  # every line has one at least
            sentences = sum(map(count_sentences, kept))
            if sentences < self.min_sentences:
                return view.text, Verdict("c4_quality.few_sentences", sentences, self.min_sentences)
        text = "\n".join(kept).strip()
        return (view.text if text == view.text else text), None


def count_sentences(line: str) -> int:
    """Sentences of one line: a new one begins with the first word after a sentence's end. At least 1."""
    stops = encode_words(line.split())["stop"]
    stops = stops[stops != PUNCTUATION]  # quotes and brackets after a period belong to what they close
    return 1 + int(np.count_nonzero((stops[:-1] == SENTENCE_END) & (stops[1:] != SENTENCE_END)))


# --- FineWeb ----------------------------------------------------------------------------------------------------------

_THAI_OR_LAO = re.compile("[\u0e00-\u0eff]")


@dataclass(frozen=True)
class FineWebQuality(Filter):
    """What a document must have; None switches a rule off. Lines are those with more than white space."""

    min_punctuated_lines: float | None = 0.12
    """Share of the lines that end with the end of a sentence."""
    short_line_chars: int = 30
    short_line_chars_unsegmented: int = 10
    """The same where a character is a word: about as much text as 30 letters of English."""
    max_short_lines: float | None = 0.67
    """Share of the lines of at most `short_line_chars` characters."""
    max_duplicate_line_chars: float | None = 0.01
    """Share of the characters in lines that occurred before."""
    max_newline_ratio: float | None = 0.3
    """Line breaks per word or punctuation mark."""

    label: ClassVar = "FineWeb"
    reasons: ClassVar = MappingProxyType(
        {
            "fineweb_quality.empty": "there is no text",
            "fineweb_quality.line_punctuation": "fewer lines end a sentence than `min_punctuated_lines`",
            "fineweb_quality.short_lines": "more short lines than `max_short_lines`",
            "fineweb_quality.duplicate_line_chars": "more in repeated lines than `max_duplicate_line_chars`",
            "fineweb_quality.newlines": "more line breaks than `max_newline_ratio`",
        }
    )

    def __call__(self, document: Document, view: TextView) -> Filtered:
        return Filtered(document, self.verdict(view))

    def verdict(self, view: TextView) -> Verdict | None:
        """The first rule that a text fails, or None. The language does not matter here; the script does."""
        text = view.text
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if not lines:
            return Verdict("fineweb_quality.empty", 0, 1)
        share = sum(line[-1] in SENTENCE_ENDS for line in lines) / len(lines)
        if (
            (limit := self.min_punctuated_lines) is not None
            and share < limit
            and not _has_no_sentence_marks(text)
        ):
            return Verdict("fineweb_quality.line_punctuation", share, limit)
        if (limit := self.max_short_lines) is not None:
            chars = self.short_line_chars
            if sum(len(line) <= chars for line in lines) / len(lines) > limit and view.is_unsegmented:
                chars = self.short_line_chars_unsegmented
            share = sum(len(line) <= chars for line in lines) / len(lines)
            if share > limit:
                return Verdict("fineweb_quality.short_lines", share, limit)
        newlines = text.count("\n")
        share = duplicate_chars(lines) / (len(text) - newlines)
        if (limit := self.max_duplicate_line_chars) is not None and share > limit:
            return Verdict("fineweb_quality.duplicate_line_chars", share, limit)
        # Every piece between spaces is at least one word: mostly there is no need to look into them.
        limit = self.max_newline_ratio
        if limit is not None and newlines > limit * len(view.pieces):
            share = newlines / len(view.words)
            if share > limit:
                return Verdict("fineweb_quality.newlines", share, limit)
        return None


def _has_no_sentence_marks(text: str) -> bool:
    """Whether the text is Thai or Lao, whose sentences end with a space."""
    return 2 * len(_THAI_OR_LAO.findall(text)) > len(text)
