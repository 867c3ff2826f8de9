"""What a report is made of: what a run of `prepare` found, and which run it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from llada.data.dedup.clusters import Clusters
from llada.data.dedup.decontaminate import Coverage
from llada.data.document import Document
from llada.data.outcomes import Report, merge
from llada.data.report.cost import Rates, rates_of
from llada.data.tokens.manifest import DatasetEntry
from llada.data.work.config import PrepareConfig
from llada.data.work.units import Plan


@dataclass(frozen=True)
class Run:
    """Which run of `prepare` a report is of."""

    output: str
    snapshot: str
    """Below the output."""
    created_at: str
    """ISO 8601, UTC."""
    preset: str | None = None
    git_commit: str | None = None
    seconds: float = 0.0
    """From its beginning to this report; of the last attempt, when there were several."""


@dataclass(frozen=True)
class Facts:
    """What a run of `prepare` found."""

    by_source: Mapping[str, Report]
    """By the name of the source, "" the only one."""
    plan: Plan
    config: PrepareConfig
    clusters: Clusters | None = None
    """Those of the deduplication."""
    documents: Mapping[int, Document] = field(default_factory=dict)
    """{id: the beginning of a document} of those that clusters and samples of duplicates name."""
    coverage: Sequence[Coverage] = ()
    """Of the evaluation sets."""
    dataset: DatasetEntry | None = None
    """What training is told of the prepared folder, earlier snapshots included."""
    run: Run | None = None

    @cached_property
    def total(self) -> Report:
        return merge(self.by_source.values())

    @cached_property
    def rates(self) -> Rates:
        return rates_of(self.total)
