"""What a filter is: settings, a label, its reasons and a decision about one document, all in one frozen dataclass.

@dataclass(frozen=True)
class Shouting(Filter):
    max_capitals: float = 0.5
    label = "Capitals"
    reasons = {"shouting.capitals": "more capitals than `max_capitals`"}

    def __call__(self, document, view):
        share = sum(map(str.isupper, view.text)) / len(view.text)
        refused = Verdict("shouting.capitals", share, self.max_capitals) if share > self.max_capitals else None
        return Filtered(document, refused)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from llada.data.document import Document
from llada.data.filters.view import TextView

_NO_EDITS: Mapping[str, int] = MappingProxyType({})


class Verdict(NamedTuple):
    """Why a document is refused: the rule, the value that failed and the limit it failed against."""

    rule: str
    """"gopher_quality.few_words"."""
    value: float | str
    limit: float | str | None = None


class Filtered(NamedTuple):
    """What a filter, or a chain of them, makes of a document."""

    document: Document
    """As it was, or rewritten, or with its language."""
    verdict: Verdict | None = None
    """Why it is refused; None: it passes."""
    edits: Mapping[str, int] = _NO_EDITS
    """What was replaced in it, by kind, for the report."""


class Filter(ABC):
    """The base of all filters. Their fields are settings; what they load, they load once per process."""

    label: ClassVar[str]
    """What the report calls it."""
    reasons: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """{rule: what it means} of every rule by which it refuses, in order; empty for a filter that refuses nothing.
    What stands before the first full stop belongs to this filter alone."""
    before: ClassVar[str | None] = None
    """A filter from outside: the name of the filter that it runs before; None: it runs after all others."""

    @abstractmethod
    def __call__(self, document: Document, view: TextView) -> Filtered:
        """Decide about a document; `view` is its text, split once for all filters."""

    def problem(self) -> str | None:
        """Why the filter cannot run with these settings, which are fine while it does not; None: it can."""
        return None

    def files(self) -> list[str]:
        """URLs of the lists and models that it reads."""
        return []

    def redact(self, text: str) -> str:
        """What of a text may be shown: a filter that takes something out of documents takes it out of samples too."""
        return text
