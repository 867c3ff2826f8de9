"""The filters of documents, in FineWeb's order, each switchable; words are split once and shared by all.

url → language → gopher_repetition → gopher_quality → c4 (rewrites) → fineweb → classifier → pii (rewrites)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from llada.data.filters.classifier import QualityClassifier
from llada.data.filters.language import UNKNOWN, LanguageConfig, language_verdict
from llada.data.filters.pii import PiiConfig, scrub
from llada.data.filters.quality import (
    C4Config,
    FineWebConfig,
    GopherQualityConfig,
    c4_quality,
    fineweb_quality,
    gopher_quality,
)
from llada.data.filters.repetition import GopherRepetitionConfig, gopher_repetition
from llada.data.filters.urls import UrlConfig, UrlFilter
from llada.data.filters.view import TextView, Verdict
from llada.files import join

FilterName = Literal[
    "url", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "classifier", "pii"
]
FILTERS: tuple[FilterName, ...] = get_args(FilterName)
WEB: tuple[FilterName, ...] = tuple(name for name in FILTERS if name != "classifier")


@dataclass(frozen=True)
class ClassifierFilterConfig:
    """A learned classifier (`llada prepare --train-classifier`) and the score that a document must reach."""

    model: str | None = None
    """URL of the classifier's folder."""
    threshold: float = 0.5


@dataclass(frozen=True)
class FilterConfig:
    """The filters' settings; which of them run is `ReadConfig.filters`."""

    url: UrlConfig = field(default_factory=UrlConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    gopher_repetition: GopherRepetitionConfig = field(default_factory=GopherRepetitionConfig)
    gopher_quality: GopherQualityConfig = field(default_factory=GopherQualityConfig)
    c4: C4Config = field(default_factory=C4Config)
    fineweb: FineWebConfig = field(default_factory=FineWebConfig)
    classifier: ClassifierFilterConfig = field(default_factory=ClassifierFilterConfig)
    pii: PiiConfig = field(default_factory=PiiConfig)


class Filtered(NamedTuple):
    """What became of a text: rewritten, its language, why it is refused (None: it is not), what was scrubbed."""

    text: str
    language: str
    verdict: Verdict | None
    pii: dict[str, int]


class Filters:
    """The filters named, ready to run; lists and models are loaded once.

    Raises ValueError for a name that is no filter, FileNotFoundError or ValueError naming a list or model.
    """

    def __init__(self, names: tuple[str, ...], config: FilterConfig) -> None:
        self.names, self.config = frozenset(resolve_filters(names)), config
        self._urls = UrlFilter(config.url) if "url" in self.names else None
        self._classifier = None
        if "classifier" in self.names:
            if config.classifier.model is None:
                raise ValueError("the filter classifier needs the setting rules.classifier.model, a folder")
            self._classifier = QualityClassifier.load(config.classifier.model)

    def __call__(self, text: str, url: str | None = None) -> Filtered:
        language, names, config = UNKNOWN, self.names, self.config
        if self._urls and url and (verdict := self._urls.verdict(url)):
            return Filtered(text, language, verdict, {})
        if "language" in names:
            language, verdict = language_verdict(text, config.language)
            if verdict:
                return Filtered(text, language, verdict, {})
        known = None if language == UNKNOWN else language
        view = TextView(text)
        if "gopher_repetition" in names and (
            verdict := gopher_repetition(view, config.gopher_repetition, known)
        ):
            return Filtered(text, language, verdict, {})
        if "gopher_quality" in names and (verdict := gopher_quality(view, config.gopher_quality, known)):
            return Filtered(text, language, verdict, {})
        if "c4" in names:
            rewritten, verdict = c4_quality(view, config.c4, known)
            if verdict:
                return Filtered(text, language, verdict, {})
            if rewritten != text:
                text, view = rewritten, TextView(rewritten)
        if "fineweb" in names and (verdict := fineweb_quality(view, config.fineweb, known)):
            return Filtered(text, language, verdict, {})
        if self._classifier is not None:
            score = float(self._classifier.score([view])[0])
            if score < config.classifier.threshold:
                verdict = Verdict("classifier.low_score", score, config.classifier.threshold)
                return Filtered(text, language, verdict, {})
        pii: dict[str, int] = {}
        if "pii" in names:
            text, pii = scrub(text, config.pii)
        return Filtered(text, language, None, pii)


def resolve_filters(names: tuple[str, ...]) -> Iterator[FilterName]:
    """The filters' names, "web" standing for all that need no model of one's own. Raises ValueError."""
    for name in names:
        if name == "web":
            yield from WEB
        elif name in FILTERS:
            yield name
        else:
            raise ValueError(
                f"there is no filter {name!r}; there are web (all but classifier), {', '.join(FILTERS)}"
            )


def filter_files(names: tuple[str, ...], config: FilterConfig) -> list[str]:
    """The URLs of the lists and models that these filters read."""
    used = set(resolve_filters(names))
    files: list[str] = []
    if "url" in used:
        lists = config.url
        for urls in (lists.domains, lists.pages, lists.banned_words, lists.soft_words, lists.banned_subwords):
            files += urls
    if "language" in used and config.language.model is not None:
        files.append(config.language.model)
    if "classifier" in used and config.classifier.model is not None:
        files.append(join(config.classifier.model, "weights.safetensors"))
    return files
