"""The numbered tasks of a preparation: plain Python, run in any order, anywhere, any number of times.

    sample_unit       unit  -> texts to train a tokenizer on
    filter_unit       unit  -> documents/<name>.parquet and its keys          (with a deduplication)
    line_unit         unit  -> the keys of the lines of what stays of it      (deduplication of lines)
    pack_unit         unit  -> its shards
    merge_group       group of units -> the sums of their reports, shards and unigram counts
    remove_documents  group of units -> nothing of what only the deduplication needed
What happens to a document in them is said in llada/data/prepare.py: `before` and `after` the barrier.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypedDict

import numpy as np
from safetensors.numpy import load, save

from llada.data.batching import batches
from llada.data.dedup.removal import repeated_documents
from llada.data.dedup.steps import line_rows, write_unit_rows
from llada.data.document import Document
from llada.data.outcomes import RejectedRecord, Report, merge, timed
from llada.data.read.documents import patiently
from llada.data.tokens.manifest import ShardEntry
from llada.data.tokens.splits import SPLITS, split_of
from llada.data.tokens.writer import Written
from llada.data.work.job import Job, PackJob
from llada.data.work.reading import Reading
from llada.data.work.results import FilterCounts, FilteredUnit, PackedUnit, read_json, unit_inputs, write_list
from llada.data.work.store import store_documents, stored_documents
from llada.data.work.units import Unit
from llada.data.work.writing import Writing
from llada.files import filesystem, join, read_bytes, write_bytes

Before = Callable[[Reading], Iterator[Document]]
After = Callable[[Iterable[Document], Writing], Written]
_READERS = 16


class TokenizerSample(TypedDict):
    """Texts of a unit, and what of it is no text."""

    texts: list[str]
    lost: dict[str, int]
    """Documents and records by the reason why they were left out."""
    examples: list[RejectedRecord]


class PackCounts(TypedDict):
    """What was packed of a unit."""

    documents: int
    tokens: int


class LineCounts(TypedDict):
    """What one unit adds to the deduplication of lines."""

    rows: int


# --- Before the barrier -----------------------------------------------------------------------------------------------


def sample_unit(job: Job, index: int, budget_bytes: int, before: Before) -> TokenizerSample:
    """Texts of the unit's train split, from its beginning, up to `budget_bytes` of UTF-8."""
    unit, config = job.plan.unit(index), job.config

    def sample(skip: frozenset[str]) -> TokenizerSample:
        reading = Reading.of(job, unit, skip)
        texts: list[str] = []
        used = 0
        for document in before(reading):
            if used >= budget_bytes:
                break
            if split_of(document, config.validation_fraction, config.split_seed) == "train":
                own = [m["content"] for m in document.messages] or [document.text]
                texts += own
                used += sum(len(text.encode()) for text in own)
        rejects = reading.rejects
        lost = dict(rejects.counts + rejects.skipped + reading.report.refused())
        return {"texts": texts, "lost": lost, "examples": rejects.examples[:1]}

    return patiently(sample)[0]


def filter_unit(job: Job, index: int, before: Before) -> FilterCounts:
    """Store what passes of a unit, with its keys, unless that is done."""
    unit = job.plan.unit(index)
    name, inputs = job.documents_name(unit), unit_inputs(unit)
    filtered = FilteredUnit.read(job.filtered_url(unit))
    if filtered and filtered.inputs == inputs and not filtered.report.unreadable_files:
        return filtered.counts  # a file that could not be read is tried again

    def store(skip: frozenset[str]) -> tuple[Reading, tuple[int, int]]:
        reading = Reading.of(job, unit, skip)
        urls = job.documents_url(unit), job.document_keys_url(unit)
        return reading, store_documents(before(reading), *urls, job.config.dedup, reading.report)

    (reading, (documents, rows)), unreadable = patiently(store)
    described = {"documents": documents, "rows": rows}
    digest = hashlib.sha256(f"{name} {described} {list(unreadable)}".encode()).hexdigest()
    counts: FilterCounts = {"documents": documents, "rows": rows, "fingerprint": int(digest[:10], 16)}
    FilteredUnit(counts, inputs, reading.finish(unreadable, name)).write(job.filtered_url(unit))
    return counts


# --- After the barrier ------------------------------------------------------------------------------------------------


def line_unit(job: PackJob, index: int) -> LineCounts:
    """Write the keys of the lines of the unit's documents that are no duplicates, unless that is done."""
    unit = job.plan.unit(index)
    done = read_json(job.line_counts_url(unit))
    if done is not None:
        return {"rows": done["rows"]}
    removed: dict[int, int] = {}
    if job.removals.documents is not None:
        removed = repeated_documents(job.dedup_folder("documents"), job.removals.documents, index)
    documents = enumerate(stored_documents(job.documents_url(unit)))
    staying = ((position, document.text) for position, document in documents if position not in removed)
    rows = [np.empty((0, 3), np.uint64)]
    for batch in batches(staying, lambda item: len(item[1])):
        positions, texts = zip(*batch, strict=True)
        rows.append(line_rows(texts, job.config.dedup, positions))
    counts: LineCounts = {"rows": write_unit_rows(job.line_keys_url(unit), np.concatenate(rows))}
    write_bytes(job.line_counts_url(unit), json.dumps(counts).encode())
    return counts


def pack_unit(job: PackJob, index: int, before: Before, after: After) -> PackCounts:
    """Write the shards of a unit, unless that is done: of its stored documents, or of its input."""
    unit = job.plan.unit(index)
    packed = finished_unit(job, unit)
    if packed is None:
        pack = _pack_stored if job.config.deduplicates else partial(_pack_input, before)
        report, (shards, unigrams) = pack(after, job, unit, index)
        seen = np.flatnonzero(unigrams)
        write_bytes(job.unigrams_url(unit), save({"ids": seen, "counts": unigrams[seen]}))
        packed = PackedUnit(job.shards_name(unit), unit_inputs(unit), report, shards)
        packed.write(job.packed_url(unit))
    splits = [packed.report.splits[split] for split in SPLITS]
    return {
        "documents": sum(split["documents"] for split in splits),
        "tokens": sum(split["tokens"] for split in splits),
    }


def finished_unit(job: PackJob, unit: Unit) -> PackedUnit | None:
    """What was packed of a unit whose outputs are complete, or None when there is work to do."""
    packed = PackedUnit.read(job.packed_url(unit))
    if packed is None or packed.inputs != unit_inputs(unit) or packed.report.unreadable_files:
        return None  # a file that could not be read is tried again
    fs, _ = filesystem(job.output)
    sizes: dict[str, int | None] = {join(job.output, shard.name): shard.bytes for shard in packed.shards}
    for url, size in [*sizes.items(), (job.unigrams_url(unit), None)]:
        try:
            if fs.size(fs._strip_protocol(url)) != size and size is not None:
                return None
        except FileNotFoundError:
            return None
    return packed


def _pack_input(before: Before, after: After, job: PackJob, unit: Unit, index: int) -> tuple[Report, Written]:
    def pack(skip: frozenset[str]) -> tuple[Reading, Written]:
        reading = Reading.of(job, unit, skip)
        return reading, after(before(reading), Writing(job, unit, index, reading.report))

    (reading, written), unreadable = patiently(pack)
    return reading.finish(unreadable, job.shards_name(unit)), written


def _pack_stored(after: After, job: PackJob, unit: Unit, index: int) -> tuple[Report, Written]:
    filtered = FilteredUnit.read(job.filtered_url(unit))
    assert filtered is not None  # filter_unit has run
    report = filtered.report
    documents = timed(stored_documents(job.documents_url(unit)), "store", report)
    return report, after(documents, Writing(job, unit, index, report))


# --- Groups of units --------------------------------------------------------------------------------------------------


def merge_group(job: PackJob, group: int) -> int:
    """Add up the reports, shards and unigram counts of a group of units; returns its units."""
    units = job.plan.group(group)
    by_source: dict[str, Report] = {}
    shards: list[ShardEntry] = []
    totals = np.zeros(0, dtype=np.int64)
    with ThreadPoolExecutor(_READERS) as pool:
        for begin in range(0, len(units), _READERS):  # a few at a time: counts take a megabyte each
            some = units[begin : begin + _READERS]
            for unit, (packed, counts) in zip(some, pool.map(partial(_read_unit, job), some), strict=True):
                total = by_source.get(unit.source)
                by_source[unit.source] = merge([total, packed.report] if total else [packed.report])
                shards += packed.shards
                missing = int(counts["ids"].max(initial=-1)) + 1 - len(totals)
                totals = np.pad(totals, (0, max(0, missing)))
                totals[counts["ids"]] += counts["counts"]
    seen = np.flatnonzero(totals)
    url = partial(job.snapshot.group_url, group)
    write_bytes(url("unigrams"), save({"ids": seen, "counts": totals[seen]}))
    write_list(url("shards"), shards)
    write_list(url("reports"), list(by_source.values()))
    return len(units)


def _read_unit(job: PackJob, unit: Unit) -> tuple[PackedUnit, dict[str, np.ndarray]]:
    """What was packed of a unit, and how often each token is trained on in it."""
    packed = PackedUnit.read(job.packed_url(unit))
    assert packed is not None  # pack_unit has run
    return packed, load(read_bytes(job.unigrams_url(unit)))


def group_reports(job: Job, group: int) -> list[Report]:
    """A report for each source of a merged group."""
    return [Report(**report) for report in _group(job, group, "reports")]


def group_shards(job: Job, group: int) -> list[ShardEntry]:
    """The shards of a merged group in corpus order."""
    return [ShardEntry(**shard) for shard in _group(job, group, "shards")]


def _group(job: Job, group: int, content: str) -> list[dict[str, Any]]:
    return json.loads(read_bytes(job.snapshot.group_url(group, content)))


def group_unigrams(job: Job, group: int, size: int) -> np.ndarray:
    """int64 (size,): how often each token is trained on in the train rows of a merged group."""
    stored = load(read_bytes(job.snapshot.group_url(group, "unigrams")))
    counts = np.zeros(size, dtype=np.int64)
    counts[stored["ids"]] = stored["counts"]
    return counts


def remove_documents(job: PackJob, group: int) -> int:
    """Delete what the deduplication needed of a group's units; returns its units."""
    fs, _ = filesystem(job.output)
    units = job.plan.group(group)
    for unit in units:
        for url in (
            job.documents_url(unit),
            job.document_keys_url(unit),
            job.line_keys_url(unit),
            job.line_counts_url(unit),
            job.filtered_url(unit),
        ):
            path = fs._strip_protocol(url)
            if fs.exists(path):
                fs.rm_file(path)
    return len(units)
