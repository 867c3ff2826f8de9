"""What `llada prepare` makes, and what all its tasks share: the configuration and the job of one snapshot.

The tasks are plain Python; pipelines/prepare.py runs them on Ray:
    read_tasks.py    sample_unit, filter_unit, line_unit       pack_tasks.py    pack_unit
    group_tasks.py   merge_group, remove_documents             dedup.py         the steps of the deduplication
A task is a pure function of its input and the `Job`: who runs it, when and how often changes no byte. Its report is
written last and means that it is done; the name holds a hash of all it depends on, so nothing stale is ever reused.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llada.data.dedup.decontaminate import DecontaminationConfig
from llada.data.dedup.steps import DedupConfig
from llada.data.dedup.steps import Plan as DedupPlan
from llada.data.filters.chain import plugin_settings
from llada.data.tokens.chat import TooLong
from llada.data.tokens.packing import Packing
from llada.data.work.read_config import ReadConfig
from llada.data.work.units import Plan, Unit
from llada.files import join, read_bytes

SPLITS = ("train", "validation")
# Settings that say where something lies or when to give up: they change no byte of a shard.
_NOT_CONTENT = ("tokenizer", "max_invalid_fraction", "max_unreadable_fraction", "keep_documents")


@dataclass(frozen=True)
class SourceConfig:
    """One of the corpora of a mixture."""

    name: str
    input: tuple[str, ...]
    """Files, folders, globs, or "@" and a list of files."""
    weight: float | None = None
    """Share of the mixture's tokens, relative to the other sources' weights; None: as much as there is."""
    epochs: float = 1.0
    """How often its rows come in one pass over the mixture; with weights, at the most."""
    max_tokens: int | None = None
    """No more of its tokens than this in one pass."""
    read: ReadConfig = field(default_factory=ReadConfig)


@dataclass(frozen=True)
class PrepareConfig:
    """What the token shards contain. Where and with how many workers they are made is no part of it."""

    kind: Literal["pretrain", "sft"] = "pretrain"
    """"pretrain": documents, packed into rows. "sft": one (prompt, answer) example per row."""
    row_length: int = 1024
    """Tokens per row; the longest context that a model can be trained on with this data."""
    packing: Packing = "concatenate_and_cut"
    """"concatenate_and_cut": LLaDA's way, no padding. "best_fit": documents are cut only when longer than a row."""
    tokenizer: str | None = None
    """Folder (any URL) of the tokenizer to use; None trains one, see `train_tokenizer_vocab`."""
    train_tokenizer_vocab: int | None = None
    """Entries of the byte-level BPE to train on this data when no tokenizer is given."""
    tokenizer_sample_bytes: int = 256 << 20
    """Text to train the tokenizer on, taken evenly from the beginning of the work units."""
    read: ReadConfig = field(default_factory=ReadConfig)
    """How documents are read and filtered, for sources that do not say it themselves."""
    sources: tuple[SourceConfig, ...] = ()
    """The mixture; empty: one source, the stage's inputs."""
    dedup: DedupConfig = field(default_factory=lambda: DedupConfig(exact=False, fuzzy=False))
    """Global deduplication (pretrain)."""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """Evaluation sets whose rows must not stand in the data (pretrain)."""
    validation_fraction: float = 0.01
    """Share of the documents (SFT: of the dialogues) that go to the validation split, chosen by their hash."""
    split_seed: int = 0
    """Changes which documents are held out for validation."""
    too_long: TooLong = "drop"
    """What happens to an example longer than a row: "drop", or "truncate_prompt" (sft)."""
    rows_per_shard: int = 16384
    """Rows in one shard file; a unit's last shard holds what is left."""
    unit_bytes: int = 64 << 20
    """Input of one work unit; what is redone after a crash. Compressed files are never cut."""
    max_invalid_fraction: float = 0.1
    """Give up when a larger share of the records cannot be read."""
    max_unreadable_fraction: float = 0.01
    """Give up when the store does not deliver a larger share of the files (and more than one)."""
    keep_documents: bool = False
    """Keep the filtered text (documents/) that the deduplication works on."""

    def validate(self) -> None:
        """Raises ValueError naming the first setting that makes no sense."""
        self.dedup.validate()
        checks = {
            "kind must be pretrain or sft": self.kind in ("pretrain", "sft"),
            "row_length must be at least 8 tokens": self.row_length >= 8,
            "row_length must be at most 1048576 tokens": self.row_length <= 1 << 20,
            "packing must be concatenate_and_cut or best_fit": self.packing
            in ("concatenate_and_cut", "best_fit"),
            "give either tokenizer or train_tokenizer_vocab": (self.tokenizer is None)
            != (not self.train_tokenizer_vocab),
            "tokenizer_sample_bytes must be positive": self.tokenizer_sample_bytes > 0,
            "validation_fraction must lie in [0, 1)": 0 <= self.validation_fraction < 1,
            "too_long must be drop or truncate_prompt": self.too_long in ("drop", "truncate_prompt"),
            "rows_per_shard must be positive": self.rows_per_shard > 0,
            "unit_bytes must be positive": self.unit_bytes > 0,
            "max_invalid_fraction must lie in [0, 1]": 0 <= self.max_invalid_fraction <= 1,
            "max_unreadable_fraction must lie in [0, 1]": 0 <= self.max_unreadable_fraction <= 1,
        }
        for problem, fine in checks.items():
            if not fine:
                value = getattr(self, problem.split()[0], "both or neither")
                raise ValueError(f"{problem} (it is {value!r})")
        names = [source.name for source in self.sources]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"two sources are called {repeated[0]!r}")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("give all sources a weight, or none")
        for source in self.sources:
            if min(source.epochs, 1 if source.weight is None else source.weight) <= 0:
                raise ValueError(f"source {source.name}: weight and epochs must be positive")
            if source.max_tokens is not None and source.max_tokens <= 0:
                raise ValueError(f"source {source.name}: max_tokens must be positive")
        for read in [self.read, *(source.read for source in self.sources)]:
            if self.kind == "sft" and (read.filters or self.deduplicates or self.decontamination.files):
                raise ValueError("filters, dedup and decontamination are for kind pretrain")

    @property
    def deduplicates(self) -> bool:
        """Whether there is a global step between reading and packing."""
        return self.dedup.exact or self.dedup.fuzzy or self.dedup.lines

    def read_of(self, source: str) -> ReadConfig:
        """How to read the documents of a source."""
        return next((s.read for s in self.sources if s.name == source), self.read)

    def content(self) -> dict[str, Any]:
        """The settings that decide the bytes of the shards: what a hash of this configuration covers. The mixture's
        weights and the inputs' places are not among them."""
        settings = {name: value for name, value in asdict(self).items() if name not in _NOT_CONTENT}
        settings["sources"] = {source.name: asdict(source.read) for source in self.sources}
        names = [name for read in (self.read, *(s.read for s in self.sources)) for name in read.filters]
        if plugins := plugin_settings(names):
            settings["plugins"] = plugins
        return settings


@dataclass(frozen=True)
class Job:
    """What all tasks of one snapshot share."""

    config: PrepareConfig
    output: str
    snapshot: str
    """URL of the snapshot's own folder, below `output`."""
    plan: Plan
    resources_hash: str = ""
    """Of the evaluation sets, URL lists and models that the filters use: they may change in their place."""
    tokenizer_hash: str = ""
    documents_dedup: DedupPlan | None = None
    lines_dedup: DedupPlan | None = None
    dedup_id: str = ""
    """Names the units and the earlier snapshots between which duplicates were looked for; empty without."""

    def documents_name(self, unit: Unit) -> str:
        return unit.name(self.config.content(), self.resources_hash)

    def shards_name(self, unit: Unit) -> str:
        return unit.name(self.config.content(), self.resources_hash, self.tokenizer_hash, self.dedup_id)

    def keys_url(self, kind: str, unit: Unit) -> str:
        """Of a unit's rows for the deduplication of `kind`."""
        name = self.documents_name(unit) if kind == "documents" else self.shards_name(unit)
        return join(self.output, "documents", f"{name}.{kind}.keys")

    def dedup_folder(self, kind: str) -> str:
        return dedup_folder(self.snapshot, self.dedup_id, kind)


def dedup_folder(snapshot: str, dedup_id: str, kind: str) -> str:
    """Where the duplicates of one set of documents are found; `index` in it is what later snapshots ask."""
    return join(snapshot, "dedup", f"{kind}-{dedup_id}")


def unit_inputs(unit: Unit) -> list[list[str]]:
    return [[part.file.name, part.file.identity] for part in unit.parts]


def read_report(url: str) -> dict[str, Any] | None:
    try:
        return json.loads(read_bytes(url))
    except (FileNotFoundError, ValueError):
        return None
