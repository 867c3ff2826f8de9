"""Limits of a document's length."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from llada.data.document import Document
from llada.data.filters.filter import Filter, Filtered, Verdict
from llada.data.filters.view import TextView


@dataclass(frozen=True)
class LengthLimits(Filter):
    """Fewest and most characters; None: no limit. It always runs, before the filters that are chosen by name."""

    min_chars: int = 1
    max_chars: int | None = None

    label: ClassVar = "Length limits"
    reasons: ClassVar = MappingProxyType(
        {"too_short": "fewer than `min_chars` characters", "too_long": "more than `max_chars`"}
    )

    def __call__(self, document: Document, view: TextView) -> Filtered:
        length = len(document.text)
        if length < self.min_chars:
            return Filtered(document, Verdict("too_short", length))
        if self.max_chars is not None and length > self.max_chars:
            return Filtered(document, Verdict("too_long", length))
        return Filtered(document)
