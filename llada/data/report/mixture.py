"""The section on the mixture: how often each source comes in one pass, and what of it never comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from llada.data.report.facts import Facts
from llada.data.report.html import (
    Markup,
    cell,
    format_count,
    format_share,
    join,
    note,
    table,
)
from llada.data.tokens.manifest import DatasetEntry
from llada.data.work.config import SourceConfig


class Ingredient(NamedTuple):
    """One source of a mixture, in tokens of its training split."""

    name: str
    weight: float | None
    tokens: int
    """That there are, of all snapshots."""
    epochs: float
    """Passes over them in one pass over the mixture."""

    @property
    def used(self) -> float:
        """Tokens of one pass over the mixture, repetitions among them."""
        return self.tokens * self.epochs

    @property
    def unused(self) -> float:
        """Tokens that do not come in one pass over the mixture."""
        return self.tokens * max(0.0, 1 - self.epochs)


def ingredients(sources: tuple[SourceConfig, ...], dataset: DatasetEntry) -> Iterator[Ingredient]:
    """Of a mixture of `sources`, as the prepared folder describes it."""
    counts = dataset.sources or {}
    for source in sources:
        tokens = counts.get(source.name, {}).get("tokens", 0)
        yield Ingredient(source.name, source.weight, tokens, dataset.epochs.get(source.name, 1.0))


def mixture(facts: Facts) -> Markup | None:
    """None when there is only one source."""
    if facts.dataset is None or not facts.config.sources:
        return None
    parts = list(ingredients(facts.config.sources, facts.dataset))
    whole = sum(part.used for part in parts)
    weights = sum(part.weight or 0 for part in parts)
    rows = [
        (
            cell(part.name),
            "–" if part.weight is None else f"{part.weight:g} ({format_share(part.weight, weights)})",
            format_count(part.tokens),
            f"{part.epochs:.3g}",
            format_count(part.used),
            format_share(part.used, whole),
            f"{format_count(part.unused)} ({format_share(part.unused, part.tokens)})" if part.tokens else "–",
        )
        for part in parts
    ]
    head = ("Source", "Weight", "Tokens", "Epochs", "Tokens in a pass", "Share", "Left unused")
    explained = (
        f"One pass over the mixture: {format_count(whole)} training tokens. Epochs: how often a source's tokens come in "
        "it. Left unused: what of a source does not come, because its weight, its epochs or its max_tokens ask for less."
    )
    return join(table(head, rows, "lrrrrrr"), note(explained))
