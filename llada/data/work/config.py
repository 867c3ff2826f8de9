"""What `llada prepare` makes: the settings that decide what the token shards contain."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from llada.data.dedup.decontaminate import DecontaminationConfig
from llada.data.dedup.steps import DedupConfig
from llada.data.filters.chain import plugin_settings, resolve_filters
from llada.data.tokens.chat import TooLong
from llada.data.tokens.encoding import Turns
from llada.data.tokens.mixture import SourceShare
from llada.data.tokens.packing import Kind, Packing
from llada.data.work.read_config import ReadConfig
from llada.settings import check_limits, limited, require

# Settings that say where something lies or when to give up: they change no byte of a shard.
_NOT_CONTENT = (
    "tokenizer",
    "max_invalid_fraction",
    "max_lost_text_fraction",
    "max_unreadable_fraction",
    "keep_documents",
)
# Settings of reading that are named in the hash only when they say something.
_OPTIONAL = ("chat_fields", "chat_roles", "encoding")


@dataclass(frozen=True)
class SourceConfig:
    """One of the corpora of a mixture."""

    name: str
    input: tuple[str, ...]
    """Files, folders, globs, or "@" and a list of files."""
    weight: float | None = limited(None, above=0)
    """Share of the mixture's tokens, relative to the other sources' weights; None: as much as there is."""
    epochs: float = limited(1.0, above=0)
    """How often its rows come in one pass over the mixture; with weights, at the most."""
    max_tokens: int | None = limited(None, low=1)
    """No more of its tokens than this in one pass."""
    read: ReadConfig = field(default_factory=ReadConfig)
    """How its documents are read and filtered."""

    def __post_init__(self) -> None:
        check_limits(self, f"source {self.name}")

    @property
    def share(self) -> SourceShare:
        """How much of the mixture it is to be."""
        return SourceShare(self.name, self.weight, self.epochs, self.max_tokens)


@dataclass(frozen=True)
class PrepareConfig:
    """What the token shards contain. Where and with how many workers they are made is no part of it."""

    kind: Kind = "pretrain"
    """"pretrain": documents, packed into rows. "sft": one (prompt, answer) example per row, of which the answer is learned
    (LLaDA). "unified": dialogues whole, packed and learned like documents, their prompts too (iLLaDA)."""
    row_length: int = limited(1024, low=8, high=1 << 20)
    """Tokens per row; the longest context that a model can be trained on with this data."""
    packing: Packing = "concatenate_and_cut"
    """"concatenate_and_cut": LLaDA's way, no padding. "best_fit": documents are cut only when longer than a row."""
    tokenizer: str | None = None
    """Folder (any URL) of the tokenizer to use; None trains one, see `train_tokenizer_vocab`."""
    train_tokenizer_vocab: int | None = limited(None, low=1)
    """Entries of the byte-level BPE to train on this data when no tokenizer is given."""
    tokenizer_sample_bytes: int = limited(256 << 20, low=1)
    """Text to train the tokenizer on, taken evenly from the beginning of the work units."""
    read: ReadConfig = field(default_factory=ReadConfig)
    """How documents are read and filtered, for sources that do not say it themselves."""
    sources: tuple[SourceConfig, ...] = ()
    """The mixture; empty: one source, the stage's inputs."""
    dedup: DedupConfig = field(default_factory=lambda: DedupConfig(exact=False, fuzzy=False))
    """Global deduplication (pretrain)."""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """Evaluation sets whose rows must not stand in the data (pretrain)."""
    validation_fraction: float = limited(0.01, low=0, below=1)
    """Share of the documents (SFT: of the dialogues) that go to the validation split, chosen by their hash."""
    split_seed: int = 0
    """Changes which documents are held out for validation, and which turns are drawn."""
    too_long: TooLong = "drop"
    """What happens to an example longer than a row: "drop", or "truncate_prompt" (sft)."""
    turns: Turns = "all"
    """Which answers of a dialogue become examples, each with all before it as its prompt: "all", or one at random, chosen
    by the dialogue's hash (LLaDA, §2.3) (sft)."""
    rows_per_shard: int = limited(16384, low=1)
    """Rows in one shard file; a unit's last shard holds what is left."""
    unit_bytes: int = limited(64 << 20, low=1)
    """Input of one work unit; what is redone after a crash. Compressed files are never cut."""
    max_invalid_fraction: float = limited(0.1, low=0, high=1)
    """Give up when a larger share of the records cannot be read."""
    max_lost_text_fraction: float = limited(0.05, low=0, high=1)
    """Give up when the tokenizer loses a larger share of a source's sampled text: letters that it does not know."""
    max_unreadable_fraction: float = limited(0.01, low=0, high=1)
    """Give up when the store does not deliver a larger share of the files (and more than one)."""
    keep_documents: bool = False
    """Keep the filtered text (documents/) that the deduplication works on."""

    def __post_init__(self) -> None:
        check_limits(self, "prepare")
        names = Counter(source.name for source in self.sources)
        repeated = [name for name, count in names.items() if count > 1]
        require(not repeated, f"two sources are called {repeated[0]!r}" if repeated else "")
        weighted = {source.weight is None for source in self.sources}
        require(len(weighted) < 2, "give all sources a weight, or none")
        reads = (self.read, *(source.read for source in self.sources))
        is_filtered = any(read.filters for read in reads)
        require(
            self.kind == "pretrain" or not (is_filtered or self.deduplicates or self.decontamination.files),
            "filters, dedup and decontamination are for kind pretrain",
        )
        is_chat = any(read.chat_fields or read.chat_roles for read in reads)
        require(
            self.kind != "pretrain" or not is_chat,
            "read.chat_fields and read.chat_roles are for kind sft and unified",
        )

    @property
    def deduplicates(self) -> bool:
        """Whether there is a global step between reading and packing."""
        return self.dedup.exact or self.dedup.fuzzy or self.dedup.lines

    def read_of(self, source: str) -> ReadConfig:
        """How to read the documents of a source."""
        return next((s.read for s in self.sources if s.name == source), self.read)

    def content(self) -> dict[str, Any]:
        """The settings that decide the bytes of the shards: what a hash of this configuration covers. The mixture's
        weights and the inputs' places are not among them, nor is what a given tokenizer makes idle."""
        settings = {name: value for name, value in asdict(self).items() if name not in _NOT_CONTENT}
        settings["read"] = _reading(self.read)
        settings["sources"] = {source.name: _reading(source.read) for source in self.sources}
        if self.kind != "sft" or self.turns == "all":  # as in folders from before one could be drawn
            del settings["turns"]
        if self.tokenizer is not None:
            settings["train_tokenizer_vocab"] = None
        names = [name for read in (self.read, *(s.read for s in self.sources)) for name in read.filters]
        if plugins := plugin_settings(names):
            settings["plugins"] = plugins
        return settings

    def in_force(self) -> dict[str, Any]:
        """The settings that the others leave a meaning, those of the sources by their names: what two preparations are
        compared by."""
        settings = asdict(self)
        settings["read"] = _in_force(self.read, self.kind)
        if self.sources:
            del settings["read"]
            settings["sources"] = {
                source.name: {**asdict(source), "read": _in_force(source.read, self.kind)}
                for source in self.sources
            }
        idle = ["packing"] if self.kind == "sft" else ["too_long", "turns"]
        if self.kind != "pretrain":
            idle += ["dedup", "decontamination"]
        if self.tokenizer is not None:
            idle += ["train_tokenizer_vocab", "tokenizer_sample_bytes"]
        if not self.deduplicates:
            idle += ["dedup", "keep_documents"]
        if not self.decontamination.files:
            idle.append("decontamination")
        return {name: value for name, value in settings.items() if name not in idle}


def _in_force(read: ReadConfig, kind: Kind) -> dict[str, Any]:
    """The settings of reading that mean something to this kind of data."""
    settings = asdict(read)
    chosen = resolve_filters(read.filters)
    settings["rules"] = {name: values for name, values in settings["rules"].items() if name in chosen}
    idle: tuple[str, ...] = ("chat_fields", "chat_roles")
    if kind != "pretrain":
        idle = ("text_field", "filters", "rules", "min_chars", "max_chars", "section_chars")
    return {name: value for name, value in settings.items() if name not in idle}


def _reading(read: ReadConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(read).items() if value or name not in _OPTIONAL}
