"""The chain of filters: one row per filter, in running order (FineWeb's), each switchable by its name.

A new filter is a file with its class and a row of `FilterSettings`. One from outside is registered in `FILTERS` by a
module that $LLADA_PLUGINS names, and runs, with its default settings, when its name is chosen.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from llada.data.document import Document
from llada.data.filters.classifier import ClassifierFilter
from llada.data.filters.filter import Filter, Filtered
from llada.data.filters.language import LanguageFilter
from llada.data.filters.pii import PiiFilter
from llada.data.filters.quality import C4Quality, FineWebQuality, GopherQuality
from llada.data.filters.repetition import GopherRepetition
from llada.data.filters.urls import UrlFilter
from llada.data.filters.view import TextView
from llada.data.outcomes import SAMPLE_CHARS, Report
from llada.errors import UserError, hint
from llada.registry import Registry


@dataclass(frozen=True)
class FilterSettings:
    """The filters and their settings, in running order; which of them run is said elsewhere."""

    url: UrlFilter = field(default_factory=UrlFilter)
    language: LanguageFilter = field(default_factory=LanguageFilter)
    gopher_repetition: GopherRepetition = field(default_factory=GopherRepetition)
    gopher_quality: GopherQuality = field(default_factory=GopherQuality)
    c4: C4Quality = field(default_factory=C4Quality)
    fineweb: FineWebQuality = field(default_factory=FineWebQuality)
    classifier: ClassifierFilter = field(default_factory=ClassifierFilter)
    pii: PiiFilter = field(default_factory=PiiFilter)


_BUILT_IN: dict[str, type[Filter]] = {
    f.name: typing.get_type_hints(FilterSettings)[f.name] for f in fields(FilterSettings)
}
FILTERS: Registry[type[Filter]] = Registry("filter", _BUILT_IN)
WEB = "web"
# FineWeb's chain. A filter that is added later is chosen by its name: it must not change what "web" stands for.
_OF_WEB = ("url", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "pii")


def resolve_filters(names: Sequence[str]) -> list[str]:
    """The filters' names in running order; "web" stands for FineWeb's. Raises UserError."""
    chosen: set[str] = set()
    for name in names:
        if name == WEB:
            chosen.update(_OF_WEB)
        elif name in FILTERS:
            chosen.add(name)
        else:
            raise UserError(f"there is no filter {name!r}; {hint(name, (WEB, *FILTERS))}")
    return [name for name in running_order() if name in chosen] if chosen else []


def running_order() -> list[str]:
    """The names of all filters, those from outside where they say they run."""
    order = list(_BUILT_IN)
    for name in FILTERS:
        if name not in _BUILT_IN:
            before = FILTERS[name].before
            if before is not None and before not in order:
                raise UserError(
                    f"the filter {name!r} is to run before {before!r}, which is none; {hint(before, order)}"
                )
            order.insert(len(order) if before is None else order.index(before), name)
    return order


def chosen_filters(names: Sequence[str], settings: FilterSettings) -> list[Filter]:
    """The filters of these names, ready to run, in running order.

    Raises UserError for a name that is no filter, and for one that lacks a setting.
    """
    chosen = [
        getattr(settings, name) if name in _BUILT_IN else FILTERS[name]() for name in resolve_filters(names)
    ]
    for each in chosen:
        if problem := each.problem():
            raise UserError(problem)
    return chosen


def plugin_settings(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{name: settings} of those filters that are registered from outside: a hash of what a configuration gives must
    cover them. Empty for the filters of `FilterSettings`."""
    return {name: asdict(FILTERS[name]()) for name in resolve_filters(names) if name not in _BUILT_IN}  # type: ignore[call-overload]


class FilterChain:
    """Filters, one after the other, each on what the one before it made of a document."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        self.filters = tuple(filters)

    def __call__(self, document: Document) -> Filtered:
        """The document as the filters leave it, or as it was when one refused it; words are split once for all."""
        view = TextView(document.text)
        edits: dict[str, int] = {}
        for each in self.filters:
            filtered = each(document, view)
            document = filtered.document
            if filtered.verdict:
                return filtered
            for kind, count in filtered.edits.items():
                edits[kind] = edits.get(kind, 0) + count
            if document.text != view.text:
                view = TextView(document.text)
        return Filtered(document, None, edits)

    def redact(self, text: str) -> str:
        """What of a text may be shown."""
        for each in self.filters:
            text = each.redact(text)
        return text


def filter_documents(documents: Iterable[Document], chain: FilterChain, report: Report) -> Iterator[Document]:
    """The documents that pass, as the chain leaves them; the report learns of the others, and of the edits."""
    for document in documents:
        filtered = chain(document)
        if (verdict := filtered.verdict) is None:
            for kind, count in filtered.edits.items():
                report.add_edits(kind, count)
            yield filtered.document
            continue
        # The text as it was read, but a sample must not show what the filters would have taken out.
        refused = replace(document, language=filtered.document.language)
        shown = chain.redact(document.text[:SAMPLE_CHARS])
        report.add(verdict.rule, refused, verdict.value, verdict.limit, shown)
