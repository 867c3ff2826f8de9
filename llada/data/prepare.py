"""Raw files to token shards, one work unit at a time. Plain Python: pipelines/prepare.py spreads the units over Ray.

    sample_unit     unit -> texts to train a tokenizer on
    process_unit    unit -> read, clean, filter, split, tokenise, pack, write shards, and last units/<name>.json

A unit is a pure function of its input, the settings and the tokenizer: who runs it, when and how often changes no byte.
The report's presence means that the unit is done. Its name holds a hash of all three, so nothing stale is ever reused.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load, save
from transformers import PreTrainedTokenizerFast

from llada.data.chat import RecordError, TooLong, encode_example, parse_dialogue, prompt_answer_pairs
from llada.data.documents import Part, Rejects, read_documents, read_records
from llada.data.files import file_sizes, join, read_bytes, write_bytes
from llada.data.packing import PackedRows, answer_tokens, concatenate_and_cut, one_per_row, take_tokens
from llada.data.quality import clean_text, length_reason
from llada.data.shards import write_shard
from llada.data.units import Unit
from llada.tokenizer import encode_texts, vocab_size

SPLITS = ("train", "validation")
_BATCH_CHARS = 1 << 20  # text tokenised in one call
# Settings that say where the tokenizer lies or when to give up: they change no byte of a shard.
_NOT_CONTENT = ("tokenizer", "max_invalid_fraction")


@dataclass(frozen=True)
class PrepareConfig:
    """What the token shards contain. Where and with how many workers they are made is no part of it."""

    kind: Literal["pretrain", "sft"] = "pretrain"
    """"pretrain": documents, concatenated and cut. "sft": one (prompt, answer) example per row."""
    row_length: int = 1024
    """Tokens per row; the longest context that a model can be trained on with this data."""
    tokenizer: str | None = None
    """Folder (any URL) of the tokenizer to use; None trains one, see `train_tokenizer_vocab`."""
    train_tokenizer_vocab: int | None = None
    """Entries of the byte-level BPE to train on this data when no tokenizer is given."""
    tokenizer_sample_bytes: int = 256 << 20
    """Text to train the tokenizer on, taken evenly from the beginning of every work unit."""
    validation_fraction: float = 0.01
    """Share of the documents (SFT: of the dialogues) that go to the validation split, chosen by their hash."""
    split_seed: int = 0
    """Changes which documents are held out for validation."""
    text_field: str = "text"
    """The field that holds the text in JSON lines and parquet (pretrain)."""
    min_chars: int = 1
    """Shorter documents are left out, after cleaning (pretrain)."""
    max_chars: int | None = None
    """Longer documents are left out; None keeps all (pretrain)."""
    section_chars: int | None = None
    """Cut longer documents at empty lines into sections of about this size, each a document of its own. For a corpus
    of a few very long texts, from which whole documents cannot be held out (pretrain)."""
    max_record_bytes: int = 64 << 20
    """Larger records are rejected before they are parsed."""
    too_long: TooLong = "drop"
    """What happens to an example longer than a row: "drop", or "truncate_prompt" (sft)."""
    rows_per_shard: int = 16384
    """Rows in one shard file; a unit's last shard holds what is left."""
    unit_bytes: int = 64 << 20
    """Input of one work unit; what is redone after a crash. Compressed files are never cut."""
    max_invalid_fraction: float = 0.1
    """Give up when a larger share of the records cannot be read."""

    def validate(self) -> None:
        """Raises ValueError naming the first setting that makes no sense."""
        checks = {
            "kind must be pretrain or sft": self.kind in ("pretrain", "sft"),
            "row_length must be at least 8 tokens": self.row_length >= 8,
            "row_length must be at most 1048576 tokens": self.row_length <= 1 << 20,
            "give either tokenizer or train_tokenizer_vocab": (self.tokenizer is None)
            != (not self.train_tokenizer_vocab),
            "tokenizer_sample_bytes must be positive": self.tokenizer_sample_bytes > 0,
            "validation_fraction must lie in [0, 1)": 0 <= self.validation_fraction < 1,
            "max_chars must be at least min_chars": self.max_chars is None
            or self.max_chars >= self.min_chars,
            "section_chars must be at least 100": self.section_chars is None or self.section_chars >= 100,
            "too_long must be drop or truncate_prompt": self.too_long in ("drop", "truncate_prompt"),
            "max_record_bytes must be positive": self.max_record_bytes > 0,
            "rows_per_shard must be positive": self.rows_per_shard > 0,
            "unit_bytes must be positive": self.unit_bytes > 0,
            "max_invalid_fraction must lie in [0, 1]": 0 <= self.max_invalid_fraction <= 1,
        }
        for problem, fine in checks.items():
            if not fine:
                raise ValueError(
                    f"{problem} (it is {getattr(self, problem.split()[0], 'both or neither')!r})"
                )

    def content(self) -> dict[str, Any]:
        """The settings that decide the bytes of the shards: what a hash of this configuration covers."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_CONTENT}


@dataclass
class UnitReport:
    """What became of a unit: written last, as units/<name>.json. `tokens` and `rows` are per split; `shards` are as
    in the manifest, each with its split."""

    name: str
    inputs: list[list[str]]
    input_bytes: int = 0
    documents: dict[str, int] = field(default_factory=dict)  # read, kept, train, validation
    rejected: dict[str, int] = field(default_factory=dict)  # unreadable, by reason
    filtered: dict[str, int] = field(default_factory=dict)  # readable and left out, by reason
    damaged_files: list[str] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)


def sample_unit(
    unit: Unit, config: PrepareConfig, budget_bytes: int, rejects: Rejects, filtered: Counter
) -> list[str]:
    """Texts of the unit's train split, from its beginning, up to `budget_bytes` of UTF-8; what is left out is counted
    in `rejects` and `filtered`."""
    texts, used = [], 0
    for split, _, content in _items(unit, config, rejects, Counter(), filtered, []):
        if used >= budget_bytes:
            break
        if split == "train":
            found = [content] if isinstance(content, str) else [m["content"] for m in content]
            texts += found
            used += sum(len(text.encode()) for text in found)
    return texts


def finished_report(
    unit: Unit,
    config: PrepareConfig,
    tokenizer_hash: str,
    output: str,
    sizes: Mapping[str, int] | None = None,
) -> UnitReport | None:
    """The report of a unit whose outputs are complete in `output`, or None when there is work to do.

    `sizes` is file_sizes(output), for a caller who asks about many units and lists the folder once.
    """
    name = unit.name(config.content(), tokenizer_hash)
    if sizes is not None and f"units/{name}.json" not in sizes:
        return None
    try:
        report = UnitReport(**json.loads(read_bytes(join(output, "units", f"{name}.json"))))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    sizes = file_sizes(output) if sizes is None else sizes
    whole = all(sizes.get(shard["name"]) == shard["bytes"] for shard in report.shards)
    return report if whole and report.inputs == _inputs(unit) and f"units/{name}.unigrams" in sizes else None


def _inputs(unit: Unit) -> list[list[str]]:
    return [[part.file.name, part.file.identity] for part in unit.parts]


def process_unit(
    unit: Unit, config: PrepareConfig, tokenizer: PreTrainedTokenizerFast, tokenizer_hash: str, output: str
) -> UnitReport:
    """Do one unit, unless its outputs are there already; both ways the same report comes back."""
    if report := finished_report(unit, config, tokenizer_hash, output):
        return report
    name = unit.name(config.content(), tokenizer_hash)
    rejects, documents, filtered = Rejects(), Counter[str](), Counter[str]()
    damaged: list[str] = []
    writers = {split: _ShardWriter(split, name, config, tokenizer, output) for split in SPLITS}
    items = _items(unit, config, rejects, documents, filtered, damaged)
    for batch in _batches(items):
        encoded = _encode(batch, config, tokenizer, filtered)
        for (split, _, _), result in zip(batch, encoded, strict=True):
            for item in result:
                writers[split].add(item)
            documents[split] += bool(result)
            documents["kept"] += bool(result)
    shards = [shard for split in SPLITS for shard in writers[split].close()]
    counts = writers["train"].counts
    seen = np.flatnonzero(counts)
    write_bytes(join(output, "units", f"{name}.unigrams"), save({"ids": seen, "counts": counts[seen]}))
    if rejects.examples:
        lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in rejects.examples)
        write_bytes(join(output, "quarantine", f"{name}.jsonl"), lines.encode())
    report = UnitReport(
        name,
        _inputs(unit),
        unit.size,
        dict(sorted(documents.items())),
        dict(sorted(rejects.counts.items())),
        dict(sorted(filtered.items())),
        damaged,
        shards,
    )
    write_bytes(join(output, "units", f"{name}.json"), json.dumps(asdict(report), indent=1).encode())
    return report


def load_unit_counts(output: str, name: str, size: int) -> np.ndarray:
    """int64 (size,): how often each token is trained on in the train rows of a finished unit."""
    stored = load(read_bytes(join(output, "units", f"{name}.unigrams")))
    counts = np.zeros(size, dtype=np.int64)
    counts[stored["ids"]] = stored["counts"]
    return counts


# --- Items: (split, size in characters, text | messages) --------------------------------------------------------------

Item = tuple[str, int, Any]


def _items(
    unit: Unit,
    config: PrepareConfig,
    rejects: Rejects,
    documents: Counter,
    filtered: Counter,
    damaged: list[str],
) -> Iterator[Item]:
    """The cleaned documents (pretrain: str) or dialogues (sft: messages) of a unit, each with its split."""
    for part in unit.parts:
        before = rejects.counts.copy()
        yield from (_texts if config.kind == "pretrain" else _dialogues)(
            part, config, rejects, documents, filtered
        )
        lost = rejects.counts - before
        if any(reason.startswith(("damaged", "truncated")) for reason in lost):
            damaged.append(part.label)


def _texts(
    part: Part, config: PrepareConfig, rejects: Rejects, documents: Counter, filtered: Counter
) -> Iterator[Item]:
    found = read_documents(
        part, rejects, text_field=config.text_field, max_record_bytes=config.max_record_bytes
    )
    for document in found:
        for text in _sections(clean_text(document.text), config.section_chars):
            documents["read"] += 1
            if reason := length_reason(text, config.min_chars, config.max_chars):
                filtered[reason] += 1
                continue
            yield _split_of(text, config), len(text), text


def _dialogues(
    part: Part, config: PrepareConfig, rejects: Rejects, documents: Counter, filtered: Counter
) -> Iterator[Item]:
    for record in read_records(part, rejects, max_record_bytes=config.max_record_bytes):
        try:
            messages = [m | {"content": clean_text(m["content"])} for m in parse_dialogue(record.fields)]
            prompt_answer_pairs(messages)
        except RecordError as problem:
            rejects.add(
                str(problem), part, record.line, json.dumps(record.fields, default=str, ensure_ascii=False)
            )
            continue
        documents["read"] += 1
        # By what opens the dialogue: several answers to one question must not fall into different splits.
        opening = next(m["content"] for m in messages if m["role"] == "user")
        yield _split_of(opening, config), sum(len(m["content"]) for m in messages), messages


def _sections(text: str, section_chars: int | None) -> Iterator[str]:
    """A text cut at empty lines (or at any line end, failing that) into sections of about `section_chars`."""
    while section_chars is not None and len(text) > section_chars:
        cut = text.rfind("\n\n", section_chars // 2, section_chars)
        cut = cut if cut >= 0 else text.rfind("\n", section_chars // 2, section_chars)
        cut = cut if cut >= 0 else section_chars
        yield text[:cut].strip("\n")
        text = text[cut:].strip("\n")
    yield text


def _split_of(text: str, config: PrepareConfig) -> str:
    """The split of a text: by its own hash, whatever stands around it."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(config.split_seed).encode()).digest()
    return "validation" if int.from_bytes(digest, "little") / 2**64 < config.validation_fraction else "train"


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += item[1]
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    batch: list[Item], config: PrepareConfig, tokenizer: PreTrainedTokenizerFast, filtered: Counter
) -> list[list]:
    """For each item what it adds to its split: one closed token array (pretrain), or its (tokens, answer start)s."""
    if config.kind == "pretrain":
        eos = [tokenizer.eos_token_id]
        encoded = encode_texts(tokenizer, [text for _, _, text in batch])
        return [[np.array(ids + eos, dtype=np.uint32)] for ids in encoded]
    results: list[list] = []
    for _, _, messages in batch:
        examples = [
            encode_example(tokenizer, history, answer, row_length=config.row_length, too_long=config.too_long)
            for history, answer in prompt_answer_pairs(messages)
        ]
        results.append([example for example in examples if example is not None])
        if missing := examples.count(None):
            filtered["example_longer_than_row"] += missing
    return results


class _ShardWriter:
    """Collects the rows of one split of one unit and writes a shard whenever one is full."""

    def __init__(
        self, split: str, name: str, config: PrepareConfig, tokenizer: PreTrainedTokenizerFast, output: str
    ):
        self.split, self.name, self.config, self.output = split, name, config, output
        self.pad_id = tokenizer.eos_token_id
        self.counts = np.zeros(vocab_size(tokenizer), dtype=np.int64)
        self.shards: list[dict[str, Any]] = []
        self.held: list = []
        self.held_size = 0  # tokens (pretrain) or examples (sft)

    def add(self, item: Any) -> None:
        pretrain = self.config.kind == "pretrain"
        self.held.append(item)
        self.held_size += len(item) if pretrain else 1
        full = self.config.rows_per_shard * (self.config.row_length if pretrain else 1)
        while self.held_size >= full:
            head, self.held = take_tokens(self.held, full) if pretrain else (self.held, [])
            self.held_size -= full
            self._write(head)

    def close(self) -> list[dict[str, Any]]:
        """Write what is left, the last pretraining row padded, and return all shards."""
        if self.held:
            self._write(self.held)
        return self.shards

    def _write(self, items: list) -> None:
        pack = concatenate_and_cut if self.config.kind == "pretrain" else one_per_row
        rows: PackedRows = pack(items, self.config.row_length, self.pad_id)
        shard = f"{self.split}/{self.name}-{len(self.shards):03d}.safetensors"
        self.shards.append(
            {"split": self.split, "name": shard, **write_shard(join(self.output, shard), rows)}
        )
        self.counts += np.bincount(answer_tokens(rows), minlength=len(self.counts))
