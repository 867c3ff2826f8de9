"""Raw files to token shards, one task at a time. Plain Python: pipelines/prepare.py runs the tasks on Ray.

    sample_unit   unit -> texts to train a tokenizer on
    filter_unit   unit -> documents/<name>.parquet and, for the deduplication, their keys   (only when that is on)
    line_unit     unit -> the keys of its lines                                             (only when that is on)
    pack_unit     unit -> split, tokenise, pack, write shards, and last units/<name>.json
    merge_group   group of units -> the sum of their reports, the list of their shards

A task is a pure function of its input and the `Job`: who runs it, when and how often changes no byte. Its report is
written last and means that it is done; the name holds a hash of all it depends on, so nothing stale is ever reused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load, save
from transformers import PreTrainedTokenizerFast

from llada.data.chat import TooLong, encode_example, prompt_answer_pairs
from llada.data.decontaminate import DecontaminationConfig, DecontaminationIndex
from llada.data.dedup import (
    DedupConfig,
    document_rows,
    line_rows,
    read_removals,
    remove_lines,
    write_unit_rows,
)
from llada.data.dedup import Plan as DedupPlan
from llada.data.documents import Rejects
from llada.data.files import file_sizes, filesystem, join, local_path, read_bytes, write_bytes
from llada.data.minhash import MinHasher
from llada.data.packing import (
    Packing,
    answer_tokens,
    best_fit,
    concatenate_and_cut,
    one_per_row,
    take_tokens,
)
from llada.data.reading import ReadConfig, Reading, Text, patiently, read_dialogues, read_texts
from llada.data.reports import KEPT, Report, merge
from llada.data.shards import write_shard
from llada.data.units import Plan, Unit
from llada.tokenizer import encode_texts, load_tokenizer, vocab_size

SPLITS = ("train", "validation")
_BATCH_CHARS = 1 << 20  # text tokenised, hashed or stored in one call
_STAT_THREADS = 16
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
            read.validate()
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


# --- Reading ----------------------------------------------------------------------------------------------------------


def sample_unit(job: Job, index: int, budget_bytes: int) -> tuple[list[str], Rejects, Counter[str]]:
    """Texts of the unit's train split, from its beginning, up to `budget_bytes` of UTF-8; and what was left out."""
    unit = job.plan.unit(index)
    reading = _new_reading(job, unit)

    def read(skip: frozenset[str]) -> list[str]:
        texts: list[str] = []
        used = 0
        for split, _, content in _items(unit, job.config, reading, skip):
            if used >= budget_bytes:
                break
            if split == "train":
                found = [content.text] if isinstance(content, Text) else [m["content"] for m in content]
                texts += found
                used += sum(len(text.encode()) for text in found)
        return texts

    return patiently(read)[0], reading.rejects, reading.report.refused()


def filter_unit(job: Job, index: int) -> dict[str, int]:
    """Read and filter a unit into documents/<name>.parquet, with its keys; unless that is done. {documents, rows}"""
    unit = job.plan.unit(index)
    name = job.documents_name(unit)
    done = join(job.output, "documents", f"{name}.json")
    found = _read_json(done)
    if found and found["inputs"] == _inputs(unit) and not found["report"]["unreadable_files"]:  # tried again
        return found["counts"]

    def read(skip: frozenset[str]) -> tuple[dict[str, int], Reading]:
        reading = _new_reading(job, unit)
        texts = read_texts(unit, reading, skip)
        url = join(job.output, "documents", f"{name}.parquet")
        return _write_documents(job, unit, url, texts, reading.report), reading

    (counts, reading), unreadable = patiently(read)
    report = _finish_reading(job, unit, reading, unreadable, name)
    # Adds up over units, whatever their order: tells the deduplication whether it looks at the same documents.
    counts["fingerprint"] = int(hashlib.sha256(f"{name} {counts} {unreadable}".encode()).hexdigest()[:10], 16)
    described = {"counts": counts, "inputs": _inputs(unit), "report": asdict(report)}
    write_bytes(done, json.dumps(described).encode())
    return counts


def _write_documents(job: Job, unit: Unit, url: str, texts: Iterator[Text], report: Report) -> dict[str, int]:
    """Store the documents in row groups of a batch each, and their keys."""
    dedup = job.config.dedup
    hasher = MinHasher(dedup.ngram, dedup.bands, dedup.rows, dedup.seed)
    schema = pa.schema([("text", pa.large_string()), ("language", pa.string()), ("place", pa.string())])
    sink, keys, count = pa.BufferOutputStream(), [np.empty((0, 2), np.uint64)], 0
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for batch in _batches(texts, lambda text: len(text.text)):
            columns = list(zip(*batch, strict=True))
            writer.write_table(
                pa.table([pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)], schema=schema)
            )
            begun = time.thread_time()
            rows = document_rows(columns[0], dedup, hasher)
            report.add_seconds("minhash", time.thread_time() - begun)
            rows[:, 1] += np.uint64(count)
            keys.append(rows)
            count += len(batch)
    write_bytes(url, sink.getvalue().to_pybytes())
    written = write_unit_rows(job.keys_url("documents", unit), np.concatenate(keys))
    return {"documents": count, "rows": written}


def read_texts_of(job: Job, unit: Unit) -> Iterator[tuple[int, Text]]:
    """(position, text) of every document that `filter_unit` kept."""
    fs, path = filesystem(join(job.output, "documents", f"{job.documents_name(unit)}.parquet"))
    position = 0
    with fs.open(path, "rb") as stream:
        for batch in pq.ParquetFile(stream).iter_batches(1024):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield position, Text(*row)
                position += 1


def line_unit(job: Job, index: int) -> int:
    """Write the keys of the lines of the unit's documents that are no duplicates; returns how many."""
    unit = job.plan.unit(index)
    removed = _removed_documents(job, index)
    rows = [np.empty((0, 3), np.uint64)]
    texts = ((position, text.text) for position, text in read_texts_of(job, unit) if position not in removed)
    for batch in _batches(texts, lambda item: len(item[1])):
        positions, contents = zip(*batch, strict=True)
        rows.append(line_rows(contents, job.config.dedup, positions))
    return write_unit_rows(job.keys_url("lines", unit), np.concatenate(rows))


def _removed_documents(job: Job, index: int) -> dict[int, int]:
    """{position: id of the document that stays for it, 0 in an earlier snapshot}."""
    if job.documents_dedup is None:
        return {}
    positions, roots = read_removals(job.dedup_folder("documents"), job.documents_dedup, index)
    return dict(zip(positions.tolist(), roots.tolist(), strict=True))


def _new_reading(job: Job, unit: Unit) -> Reading:
    index = None
    if job.config.decontamination.files:
        index = _decontamination(join(job.snapshot, "decontamination.safetensors"), job.resources_hash)
    return Reading(job.config.read_of(unit.source), Report(unit.source, 1, unit.size), index)


@functools.lru_cache(maxsize=1)
def _decontamination(url: str, digest: str) -> DecontaminationIndex:
    return DecontaminationIndex.load(url)


def _finish_reading(job: Job, unit: Unit, reading: Reading, unreadable: Sequence[str], name: str) -> Report:
    report = reading.report
    report.rejected = dict(sorted(reading.rejects.counts.items()))
    report.skipped = dict(sorted(reading.rejects.skipped.items()))
    report.unreadable_files = list(unreadable)
    if reading.rejects.examples:
        lines = "".join(
            json.dumps(example, ensure_ascii=False) + "\n" for example in reading.rejects.examples
        )
        write_bytes(join(job.output, "quarantine", f"{name}.jsonl"), lines.encode())
    return report


# --- Packing ----------------------------------------------------------------------------------------------------------

Item = tuple[str, int, Any]  # (split, characters, Text | messages)


def pack_unit(job: Job, index: int) -> dict[str, int]:
    """Write the shards of a unit, unless that is done; returns its {documents, tokens}."""
    unit = job.plan.unit(index)
    name = job.shards_name(unit)
    if (found := finished_report(job, unit)) is None:
        found = (_pack_documents if job.config.deduplicates else _pack_input)(job, unit, index, name)
        write_bytes(join(job.output, "units", f"{name}.json"), json.dumps(found).encode())
    splits = found["report"]["splits"]
    return {what: sum(splits[split][what] for split in SPLITS) for what in ("documents", "tokens")}


def finished_report(job: Job, unit: Unit) -> dict[str, Any] | None:
    """units/<name>.json of a unit whose outputs are complete, or None when there is work to do."""
    name = job.shards_name(unit)
    found = _read_json(join(job.output, "units", f"{name}.json"))
    if found is None or found["inputs"] != _inputs(unit) or found["report"]["unreadable_files"]:
        return None  # a file that could not be read is tried again
    fs, _ = filesystem(job.output)
    for file, size in [(s["name"], s["bytes"]) for s in found["shards"]] + [(f"units/{name}.unigrams", None)]:
        try:
            if fs.size(fs._strip_protocol(join(job.output, file))) != size and size is not None:
                return None
        except FileNotFoundError:
            return None
    return found


def _inputs(unit: Unit) -> list[list[str]]:
    return [[part.file.name, part.file.identity] for part in unit.parts]


def _pack_input(job: Job, unit: Unit, index: int, name: str) -> dict[str, Any]:
    def pack(skip: frozenset[str]) -> tuple[Reading, list[dict[str, Any]]]:
        reading = _new_reading(job, unit)
        return reading, _write_shards(job, name, _items(unit, job.config, reading, skip), reading.report)

    (reading, shards), unreadable = patiently(pack)
    report = _finish_reading(job, unit, reading, unreadable, name)
    return {"name": name, "inputs": _inputs(unit), "report": asdict(report), "shards": shards}


def _pack_documents(job: Job, unit: Unit, index: int, name: str) -> dict[str, Any]:
    stored = _read_json(join(job.output, "documents", f"{job.documents_name(unit)}.json"))
    assert stored is not None  # filter_unit has run
    report = Report(**stored["report"])
    shards = _write_shards(job, name, _unique_items(job, unit, index, report), report)
    return {"name": name, "inputs": _inputs(unit), "report": asdict(report), "shards": shards}


def _unique_items(job: Job, unit: Unit, index: int, report: Report) -> Iterator[Item]:
    """The items of a unit whose documents, and lines, stand in the corpus for the first time."""
    config = job.config
    removed = _removed_documents(job, index)
    lines: dict[int, list[int]] = {}
    if job.lines_dedup is not None:
        for position, number in zip(
            *read_removals(job.dedup_folder("lines"), job.lines_dedup, index), strict=True
        ):
            lines.setdefault(int(position), []).append(int(number))
    for position, text in read_texts_of(job, unit):
        root = removed.get(position)
        if root is not None:
            outcome = "duplicate" if root else "duplicate_of_earlier_snapshot"
            report.add(outcome, text.text, text.language, text.place, root or None)
            continue
        if position in lines:
            report.edits["duplicate_lines"] = report.edits.get("duplicate_lines", 0) + len(lines[position])
            rest = remove_lines(text.text, np.array(lines[position])).strip("\n")
            if len(rest) < max(1, config.read_of(unit.source).min_chars):
                report.add("duplicate_lines", text.text, text.language, text.place, len(lines[position]))
                continue
            text = text._replace(text=rest)
        yield _split_of(text.text, config), len(text.text), text


def _items(unit: Unit, config: PrepareConfig, reading: Reading, skip: frozenset[str]) -> Iterator[Item]:
    """The documents (pretrain) or dialogues (sft) of a unit, each with its split."""
    if config.kind == "pretrain":
        for text in read_texts(unit, reading, skip):
            yield _split_of(text.text, config), len(text.text), text
        return
    for messages in read_dialogues(unit, reading, skip):
        # By what opens the dialogue: several answers to one question must not fall into different splits.
        opening = next(m["content"] for m in messages if m["role"] == "user")
        yield _split_of(opening, config), sum(len(m["content"]) for m in messages), messages


def _split_of(text: str, config: PrepareConfig) -> str:
    """The split of a text: by its own hash, whatever stands around it."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(config.split_seed).encode()).digest()
    return "validation" if int.from_bytes(digest, "little") / 2**64 < config.validation_fraction else "train"


def _batches(items: Iterable[Any], size_of: Callable[[Any], int]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_shards(job: Job, name: str, items: Iterator[Item], report: Report) -> list[dict[str, Any]]:
    """Tokenise, pack and store; the shards as the index lists them. `report` learns what was kept."""
    tokenizer = _load_tokenizer(join(job.output, "tokenizer"), job.tokenizer_hash)
    writers = {split: _ShardWriter(split, name, job.config, tokenizer, job.output) for split in SPLITS}
    documents = Counter[str]()
    for batch in _batches(items, lambda item: item[1]):
        begun = time.thread_time()
        encoded = _encode(batch, job.config, tokenizer)
        report.add_seconds("tokenise", time.thread_time() - begun)
        for (split, _, content), result in zip(batch, encoded, strict=True):
            text, language, place = content if isinstance(content, Text) else (_opening(content), "und", "")
            if not result:
                report.add("example_longer_than_row", text, language, place)
                continue
            report.add(KEPT, text, language, place)
            report.add_length(
                "tokens", sum(len(item) if job.config.kind == "pretrain" else len(item[0]) for item in result)
            )
            documents[split] += 1
            for item in result:
                writers[split].add(item)
    begun = time.thread_time()
    shards = [shard for split in SPLITS for shard in writers[split].close()]
    report.add_seconds("pack", time.thread_time() - begun + sum(w.seconds for w in writers.values()))
    for split in SPLITS:
        own = [shard for shard in shards if shard["split"] == split]
        totals = {what: sum(shard[what] for shard in own) for what in ("rows", "tokens")}
        report.splits[split] = {"documents": documents[split], **totals}
    counts = writers["train"].counts
    seen = np.flatnonzero(counts)
    write_bytes(join(job.output, "units", f"{name}.unigrams"), save({"ids": seen, "counts": counts[seen]}))
    return shards


def _opening(messages: Sequence[dict[str, str]]) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


@functools.lru_cache(maxsize=1)
def _load_tokenizer(url: str, tokenizer_hash: str) -> PreTrainedTokenizerFast:
    """The tokenizer, loaded once per worker process; the hash tells a later tokenizer at the same place apart."""
    if path := local_path(url):
        return load_tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        for name in file_sizes(url):
            (Path(folder) / name).write_bytes(read_bytes(join(url, name)))
        return load_tokenizer(folder)


def _encode(batch: list[Item], config: PrepareConfig, tokenizer: PreTrainedTokenizerFast) -> list[list]:
    """For each item what it adds to its split: one closed token array (pretrain), or its (tokens, answer start)s."""
    if config.kind == "pretrain":
        eos = [tokenizer.eos_token_id]
        encoded = encode_texts(tokenizer, [content.text for _, _, content in batch])
        return [[np.array(ids + eos, dtype=np.uint32)] for ids in encoded]
    results: list[list] = []
    for _, _, messages in batch:
        examples = (
            encode_example(tokenizer, history, answer, row_length=config.row_length, too_long=config.too_long)
            for history, answer in prompt_answer_pairs(messages)
        )
        results.append([example for example in examples if example is not None])
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
        self.seconds = 0.0

    def add(self, item: Any) -> None:
        pretrain = self.config.kind == "pretrain"
        self.held.append(item)
        self.held_size += len(item) if pretrain else 1
        full = self.config.rows_per_shard * (self.config.row_length if pretrain else 1)
        while self.held_size >= full:
            begun = time.thread_time()
            if pretrain and self.config.packing == "concatenate_and_cut":
                head, self.held = take_tokens(self.held, full)
            else:
                head, self.held = self.held, []
            self._write(head)
            self.held_size = sum(map(len, self.held)) if pretrain else 0
            self.seconds += time.thread_time() - begun

    def close(self) -> list[dict[str, Any]]:
        """Write what is left, the last pretraining row padded, and return all shards."""
        if self.held:
            self._write(self.held)
        return self.shards

    def _write(self, items: list) -> None:
        if self.config.kind == "sft":
            rows = one_per_row(items, self.config.row_length, self.pad_id)
        else:
            pack = best_fit if self.config.packing == "best_fit" else concatenate_and_cut
            rows = pack(items, self.config.row_length, self.pad_id)
        shard = f"{self.split}/{self.name}-{len(self.shards):03d}.safetensors"
        self.shards.append(
            {"split": self.split, "name": shard, **write_shard(join(self.output, shard), rows)}
        )
        self.counts += np.bincount(answer_tokens(rows), minlength=len(self.counts))


# --- Groups -----------------------------------------------------------------------------------------------------------


def merge_group(job: Job, group: int) -> int:
    """Add up the reports, shards and unigram counts of a group of units; returns its units."""
    units = job.plan.group(group)
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        names = [job.shards_name(unit) for unit in units]
        found = list(pool.map(lambda n: _read_json(join(job.output, "units", f"{n}.json")), names))
        counts = list(pool.map(lambda n: load(read_bytes(join(job.output, "units", f"{n}.unigrams"))), names))
    by_source: dict[str, list[Report]] = {}
    shards = []
    for unit, entry in zip(units, found, strict=True):
        assert entry is not None  # pack_unit has run
        by_source.setdefault(unit.source, []).append(Report(**entry["report"]))
        shards += [{**shard, "source": unit.source} for shard in entry["shards"]]
    ids = np.concatenate([entry["ids"] for entry in counts])
    seen, place = np.unique(ids, return_inverse=True)
    totals = np.zeros(len(seen), dtype=np.int64)
    np.add.at(totals, place, np.concatenate([entry["counts"] for entry in counts]))
    reports = [asdict(merge(reports)) for reports in by_source.values()]
    write_bytes(_group_url(job, group, "unigrams"), save({"ids": seen, "counts": totals}))
    write_bytes(_group_url(job, group, "shards"), json.dumps(shards).encode())
    write_bytes(_group_url(job, group, "reports"), json.dumps(reports).encode())
    return len(units)


def group_reports(job: Job, group: int) -> list[Report]:
    """A report for each source of a merged group."""
    return [Report(**report) for report in json.loads(read_bytes(_group_url(job, group, "reports")))]


def group_shards(job: Job, group: int) -> list[dict[str, Any]]:
    """The shards of a merged group in corpus order, each with its split and source."""
    return json.loads(read_bytes(_group_url(job, group, "shards")))


def group_unigrams(job: Job, group: int, size: int) -> np.ndarray:
    """int64 (size,): how often each token is trained on in the train rows of a merged group."""
    stored = load(read_bytes(_group_url(job, group, "unigrams")))
    counts = np.zeros(size, dtype=np.int64)
    counts[stored["ids"]] = stored["counts"]
    return counts


def _group_url(job: Job, group: int, what: str) -> str:
    return join(job.snapshot, "groups", f"{group:06d}.{what}")


def remove_documents(job: Job, group: int) -> int:
    """Delete what the deduplication needed of a group's units; returns its units."""
    fs, _ = filesystem(job.output)
    for unit in job.plan.group(group):
        stem = join(job.output, "documents", job.documents_name(unit))
        for url in (
            f"{stem}.parquet",
            job.keys_url("documents", unit),
            job.keys_url("lines", unit),
            f"{stem}.json",
        ):
            path = fs._strip_protocol(url)
            if fs.exists(path):
                fs.rm_file(path)
    return len(job.plan.group(group))


def _read_json(url: str) -> dict[str, Any] | None:
    try:
        return json.loads(read_bytes(url))
    except (FileNotFoundError, ValueError):
        return None
