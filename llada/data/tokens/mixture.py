"""How often each source comes in one pass over a mixture of corpora."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class SourceShare(NamedTuple):
    """How much of a mixture a source is to be."""

    name: str
    weight: float | None = None
    """Of its tokens, relative to the other sources' weights; all have one or none has."""
    epochs: float = 1.0
    """Passes over its rows; with weights, at the most."""
    max_tokens: int | None = None
    """In one pass over the mixture."""


def mixture_epochs(sources: Sequence[SourceShare], tokens: Mapping[str, int]) -> dict[str, float]:
    """{source: passes over its rows in one pass over the mixture}, for `tokens` in the training split of each.

    Without weights a source comes `epochs` times, or less where `max_tokens` says so. With weights the mixture is the
    largest that has these shares of tokens and in which no source comes more often than that. Empty sources drop out.
    """
    present = [source for source in sources if tokens.get(source.name)]
    most = {
        source.name: min(source.epochs * tokens[source.name], source.max_tokens or float("inf"))
        for source in present
    }
    weights = {source.name: source.weight for source in present if source.weight is not None}
    if not weights:
        return {name: available / tokens[name] for name, available in most.items()}
    total = min(most[name] / weight for name, weight in weights.items())
    return {name: weight * total / tokens[name] for name, weight in weights.items()}
