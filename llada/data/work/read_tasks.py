"""Tasks that read a work unit (plain Python; pipelines/prepare.py runs them on Ray).

sample_unit   unit -> texts to train a tokenizer on
filter_unit   unit -> documents/<name>.parquet and, for the deduplication, their keys   (only when that is on)
line_unit     unit -> the keys of its lines                                             (only when that is on)
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llada.data.batching import batches
from llada.data.dedup.decontaminate import Decontamination, DecontaminationIndex
from llada.data.dedup.minhash import MinHasher
from llada.data.dedup.steps import document_rows, line_rows, read_removals, write_unit_rows
from llada.data.document import Document
from llada.data.filters.chain import FilterChain, filter_documents
from llada.data.outcomes import Rejects, Report, timed
from llada.data.read.cleaning import clean
from llada.data.read.dialogues import read_dialogues
from llada.data.read.documents import patiently, read, read_documents
from llada.data.work.job import Job, PrepareConfig, read_report, unit_inputs
from llada.data.work.read_config import ReadConfig
from llada.data.work.units import Unit
from llada.files import filesystem, join, write_bytes, writing

Item = tuple[str, Document]  # its split


@dataclass
class Reading:
    """What becomes of the documents of a unit while they are read: how they are, and what is noted."""

    config: ReadConfig
    report: Report
    decontamination: DecontaminationIndex | None = None
    rejects: Rejects = field(default_factory=Rejects)


def sample_unit(job: Job, index: int, budget_bytes: int) -> tuple[list[str], Rejects, Counter[str]]:
    """Texts of the unit's train split, from its beginning, up to `budget_bytes` of UTF-8; and what was left out."""
    unit = job.plan.unit(index)
    reading = new_reading(job, unit)

    def sample(skip: frozenset[str]) -> list[str]:
        texts: list[str] = []
        used = 0
        for split, document in unit_items(unit, job.config, reading, skip):
            if used >= budget_bytes:
                break
            if split == "train":
                own = [m["content"] for m in document.messages] or [document.text]
                texts += own
                used += sum(len(text.encode()) for text in own)
        return texts

    return patiently(sample)[0], reading.rejects, reading.report.refused()


def filter_unit(job: Job, index: int) -> dict[str, int]:
    """Read and filter a unit into documents/<name>.parquet, with its keys; unless that is done. {documents, rows}"""
    unit = job.plan.unit(index)
    name = job.documents_name(unit)
    done = join(job.output, "documents", f"{name}.json")
    found = read_report(done)
    if found and found["inputs"] == unit_inputs(unit) and not found["report"]["unreadable_files"]:
        return found["counts"]  # a file that could not be read is tried again

    def store(skip: frozenset[str]) -> tuple[dict[str, int], Reading]:
        reading = new_reading(job, unit)
        url = join(job.output, "documents", f"{name}.parquet")
        documents = filtered_documents(unit, reading, skip)
        return _write_documents(job, unit, url, documents, reading.report), reading

    (counts, reading), unreadable = patiently(store)
    report = finish_reading(job, unit, reading, unreadable, name)
    # Adds up over units, whatever their order: tells the deduplication whether it looks at the same documents.
    counts["fingerprint"] = int(hashlib.sha256(f"{name} {counts} {unreadable}".encode()).hexdigest()[:10], 16)
    described = {"counts": counts, "inputs": unit_inputs(unit), "report": asdict(report)}
    write_bytes(done, json.dumps(described).encode())
    return counts


def filtered_documents(
    unit: Unit, reading: Reading, skip: frozenset[str] = frozenset()
) -> Iterator[Document]:
    """The documents of a unit that pass all filters, in order."""
    config, report = reading.config, reading.report
    filters = config.chain()
    if reading.decontamination is not None:
        filters.append(Decontamination(reading.decontamination, report.matches))
    documents = read(unit.parts, read_documents, config.options, report, reading.rejects, skip=skip)
    documents = clean(documents, config.section_chars)
    documents = filter_documents(documents, FilterChain(filters), report)
    return timed(documents, "filter", report)


def _write_documents(
    job: Job, unit: Unit, url: str, documents: Iterator[Document], report: Report
) -> dict[str, int]:
    """Store the documents in row groups of a batch each, and their keys."""
    dedup = job.config.dedup
    hasher = MinHasher(dedup.ngram, dedup.bands, dedup.rows, dedup.seed)
    schema = pa.schema([("text", pa.large_string()), ("language", pa.string()), ("place", pa.string())])
    keys, count = [np.empty((0, 2), np.uint64)], 0
    with writing(url) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches(documents, lambda document: document.size):
            begun = time.thread_time()
            columns = list(zip(*((d.text, d.language, d.place) for d in batch), strict=True))
            arrays = [pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))
            report.add_seconds("store", time.thread_time() - begun)
            begun = time.thread_time()
            rows = document_rows(columns[0], dedup, hasher)
            report.add_seconds("minhash", time.thread_time() - begun)
            rows[:, 1] += np.uint64(count)
            keys.append(rows)
            count += len(batch)
    written = write_unit_rows(job.keys_url("documents", unit), np.concatenate(keys))
    return {"documents": count, "rows": written}


def read_texts_of(job: Job, unit: Unit) -> Iterator[tuple[int, Document]]:
    """(position, document) of every document that `filter_unit` kept."""
    fs, path = filesystem(join(job.output, "documents", f"{job.documents_name(unit)}.parquet"))
    position = 0
    with fs.open(path, "rb") as stream:
        for batch in pq.ParquetFile(stream).iter_batches(1024):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                text, language, place = row
                yield position, Document(text, place, language=language)
                position += 1


def read_text_of(job: Job, unit: Unit, position: int) -> Document:
    """One document that `filter_unit` kept; reads its row group alone."""
    fs, path = filesystem(join(job.output, "documents", f"{job.documents_name(unit)}.parquet"))
    with fs.open(path, "rb") as stream:
        file = pq.ParquetFile(stream)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if position < rows:
                row = file.read_row_group(group).slice(position, 1)
                text, language, place = (column[0].as_py() for column in row.columns)
                return Document(text, place, language=language)
            position -= rows
    raise ValueError(
        f"{path} ends before the document that is asked for; delete documents/ and run prepare again"
    )


def line_unit(job: Job, index: int) -> dict[str, int]:
    """Write the keys of the lines of the unit's documents that are no duplicates, unless that is done. {rows}"""
    unit = job.plan.unit(index)
    url = job.keys_url("lines", unit)
    if (found := read_report(f"{url}.json")) is not None:
        return found
    removed = removed_documents(job, index)
    rows = [np.empty((0, 3), np.uint64)]
    texts = ((position, text.text) for position, text in read_texts_of(job, unit) if position not in removed)
    for batch in batches(texts, lambda item: len(item[1])):
        positions, contents = zip(*batch, strict=True)
        rows.append(line_rows(contents, job.config.dedup, positions))
    counts = {"rows": write_unit_rows(url, np.concatenate(rows))}
    write_bytes(f"{url}.json", json.dumps(counts).encode())
    return counts


def removed_documents(job: Job, index: int) -> dict[int, int]:
    """{position: id of the document that stays for it, 0 in an earlier snapshot}."""
    if job.documents_dedup is None:
        return {}
    positions, roots = read_removals(job.dedup_folder("documents"), job.documents_dedup, index)
    return dict(zip(positions.tolist(), roots.tolist(), strict=True))


def new_reading(job: Job, unit: Unit) -> Reading:
    index = None
    if job.config.decontamination.files:
        index = _decontamination(join(job.snapshot, "decontamination.safetensors"), job.resources_hash)
    return Reading(job.config.read_of(unit.source), Report(unit.source, 1, unit.size), index)


@functools.lru_cache(maxsize=1)
def _decontamination(url: str, digest: str) -> DecontaminationIndex:
    return DecontaminationIndex.load(url)


def finish_reading(job: Job, unit: Unit, reading: Reading, unreadable: Sequence[str], name: str) -> Report:
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


def unit_items(unit: Unit, config: PrepareConfig, reading: Reading, skip: frozenset[str]) -> Iterator[Item]:
    """The documents (pretrain) or dialogues (sft) of a unit, each with its split."""
    if config.kind == "pretrain":
        for document in filtered_documents(unit, reading, skip):
            yield split_of(document.text, config), document
        return
    options = reading.config.options
    for document in read(unit.parts, read_dialogues, options, reading.report, reading.rejects, skip=skip):
        # By what opens the dialogue: several answers to one question must not fall into different splits.
        opening = next(m["content"] for m in document.messages if m["role"] == "user")
        yield split_of(opening, config), document


def split_of(text: str, config: PrepareConfig) -> str:
    """The split of a text: by its own hash, whatever stands around it."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(config.split_seed).encode()).digest()
    return "validation" if int.from_bytes(digest, "little") / 2**64 < config.validation_fraction else "train"
