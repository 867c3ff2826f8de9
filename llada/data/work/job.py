"""Where everything of a prepared folder lies, and what all tasks of one snapshot share.

    Snapshot   the folder of one snapshot, below the output
    Job        what the tasks that read share; names the documents of a unit
    PackJob    what the tasks after them share: a Job, with the tokenizer and what is to be removed; names the shards
A task is a pure function of its input and its job: who runs it, when and how often changes no byte. Its report is
written last and means that it is done; the name holds a hash of all it depends on, so nothing stale is ever reused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llada.data.dedup.steps import DedupPlan
from llada.data.dedup.steps import Kind as DedupKind
from llada.data.tokens.manifest import MANIFEST
from llada.data.work.config import PrepareConfig
from llada.data.work.units import Plan, Unit
from llada.files import join


@dataclass(frozen=True)
class Snapshot:
    """What one run adds to the folder `output`: <output>/snapshots/NNNN."""

    output: str
    number: int

    @property
    def name(self) -> str:
        """Below the output."""
        return f"snapshots/{self.number:04d}"

    @property
    def url(self) -> str:
        return join(self.output, self.name)

    @property
    def plan_url(self) -> str:
        """Folder of the work units."""
        return join(self.url, "plan")

    @property
    def manifest_url(self) -> str:
        """The last file that is written."""
        return join(self.url, MANIFEST)

    @property
    def report_url(self) -> str:
        return join(self.url, "report.html")

    @property
    def tokenizer_url(self) -> str:
        return join(self.url, "tokenizer")

    @property
    def evaluation_index_url(self) -> str:
        """The n-grams of the evaluation sets, for the decontamination."""
        return join(self.url, "decontamination.safetensors")

    @property
    def dedup_url(self) -> str:
        return join(self.url, "dedup")

    @property
    def cleaned_url(self) -> str:
        """Says that nothing is left that only the deduplication needed."""
        return join(self.url, "clean.json")

    def dedup_folder(self, dedup_id: str, kind: DedupKind) -> str:
        """Where the duplicates of one set of documents are found."""
        return join(self.dedup_url, f"{kind}-{dedup_id}")

    def dedup_index_url(self, dedup_id: str, kind: DedupKind) -> str:
        """What later snapshots ask for duplicates."""
        return join(self.dedup_folder(dedup_id, kind), "index")

    def index_name(self, split: str) -> str:
        """The list of a split's shards, in the snapshot."""
        return f"{split}.parquet"

    def beside(self, name: str) -> str:
        """A file of this snapshot, as the manifest of a later one calls it; a name that another one gave stays."""
        return name if "/" in name else join("..", f"{self.number:04d}", name)

    def group_url(self, group: int, content: str) -> str:
        """The sum over a group of units: its "reports", "shards" or "unigrams"."""
        return join(self.url, "groups", f"{group:06d}.{content}")


@dataclass(frozen=True)
class Job:
    """What the tasks that read the units of a snapshot share."""

    config: PrepareConfig
    snapshot: Snapshot
    plan: Plan
    resources_hash: str = ""
    """Of the evaluation sets, URL lists and models that the filters use: they may change in their place."""

    @cached_property
    def content(self) -> dict[str, Any]:
        """What of the configuration decides the bytes: part of every name."""
        return self.config.content()

    @property
    def output(self) -> str:
        return self.snapshot.output

    @property
    def tokenizer_url(self) -> str:
        return tokenizer_url(self.output)

    def documents_name(self, unit: Unit) -> str:
        return unit.name(self.content, self.resources_hash)

    def documents_url(self, unit: Unit) -> str:
        """The documents that passed the filters, when there is a deduplication."""
        return join(self.output, "documents", f"{self.documents_name(unit)}.parquet")

    def filtered_url(self, unit: Unit) -> str:
        """The report beside them."""
        return join(self.output, "documents", f"{self.documents_name(unit)}.json")

    def document_keys_url(self, unit: Unit) -> str:
        """The keys by which the documents are deduplicated."""
        return join(self.output, "documents", f"{self.documents_name(unit)}.documents.keys")

    def quarantine_url(self, name: str) -> str:
        """The records that could not be read, by the name under which the unit was read."""
        return join(self.output, "quarantine", f"{name}.jsonl")

    def packing(self, tokenizer_hash: str, removals: Removals | None = None) -> PackJob:
        """The job of the tasks after the barrier."""
        settled = (self.config, self.snapshot, self.plan, self.resources_hash)
        return PackJob(*settled, tokenizer_hash, removals or Removals())


@dataclass(frozen=True)
class Removals:
    """What the deduplication found, and under which id; of an empty one nothing is removed."""

    dedup_id: str = ""
    """Names the units and the earlier snapshots between which duplicates were looked for; empty without."""
    documents: DedupPlan | None = None
    lines: DedupPlan | None = None


@dataclass(frozen=True)
class PackJob(Job):
    """What the tasks that make shards share: all that their bytes depend on."""

    tokenizer_hash: str = ""
    removals: Removals = Removals()

    def shards_name(self, unit: Unit) -> str:
        settled = (self.resources_hash, self.tokenizer_hash, self.removals.dedup_id)
        return unit.name(self.content, *settled)

    def packed_url(self, unit: Unit) -> str:
        """The report of a unit whose shards are written."""
        return join(self.output, "units", f"{self.shards_name(unit)}.json")

    def unigrams_url(self, unit: Unit) -> str:
        """How often each token is trained on in the unit."""
        return join(self.output, "units", f"{self.shards_name(unit)}.unigrams")

    def line_keys_url(self, unit: Unit) -> str:
        """The keys by which the lines of the documents that stay are deduplicated."""
        return join(self.output, "documents", f"{self.shards_name(unit)}.lines.keys")

    def line_counts_url(self, unit: Unit) -> str:
        """Says that the keys of the unit's lines are written, and how many."""
        return self.line_keys_url(unit) + ".json"

    def keys_url(self, kind: DedupKind, unit: Unit) -> str:
        return self.document_keys_url(unit) if kind == "documents" else self.line_keys_url(unit)

    def dedup_folder(self, kind: DedupKind) -> str:
        return self.snapshot.dedup_folder(self.removals.dedup_id, kind)


def tokenizer_url(output: str) -> str:
    """The tokenizer of all snapshots."""
    return join(output, "tokenizer")
