"""The task that makes a work unit's shards: split, tokenise, pack, write, and last units/<name>.json.

pack_unit     unit -> train/, validation/ shards, units/<name>.unigrams, units/<name>.json
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from transformers import PreTrainedTokenizerFast

from llada.data.batching import batches
from llada.data.dedup.steps import read_removals, remove_lines
from llada.data.document import prompt_answer_pairs
from llada.data.outcomes import KEPT, Report, timed
from llada.data.read.documents import patiently
from llada.data.tokens.chat import encode_example
from llada.data.tokens.packing import answer_tokens, best_fit, concatenate_and_cut, one_per_row, take_tokens
from llada.data.tokens.shards import write_shard
from llada.data.work.job import SPLITS, Job, PrepareConfig, read_report, unit_inputs
from llada.data.work.read_tasks import (
    Item,
    Reading,
    finish_reading,
    new_reading,
    read_texts_of,
    removed_documents,
    split_of,
    unit_items,
)
from llada.data.work.units import Unit
from llada.files import file_sizes, filesystem, join, local_path, read_bytes, write_bytes
from llada.tokenizer import encode_texts, load_tokenizer, vocab_size

_ENCODED_CHARS = (
    1 << 18
)  # in one call: the tokenizers library takes about 100 bytes for each, and the caches are small


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
    found = read_report(join(job.output, "units", f"{name}.json"))
    if found is None or found["inputs"] != unit_inputs(unit) or found["report"]["unreadable_files"]:
        return None  # a file that could not be read is tried again
    fs, _ = filesystem(job.output)
    for file, size in [(s["name"], s["bytes"]) for s in found["shards"]] + [(f"units/{name}.unigrams", None)]:
        try:
            if fs.size(fs._strip_protocol(join(job.output, file))) != size and size is not None:
                return None
        except FileNotFoundError:
            return None
    return found


def _pack_input(job: Job, unit: Unit, index: int, name: str) -> dict[str, Any]:
    def pack(skip: frozenset[str]) -> tuple[Reading, list[dict[str, Any]]]:
        reading = new_reading(job, unit)
        return reading, _write_shards(job, name, unit_items(unit, job.config, reading, skip), reading.report)

    (reading, shards), unreadable = patiently(pack)
    report = finish_reading(job, unit, reading, unreadable, name)
    return {"name": name, "inputs": unit_inputs(unit), "report": asdict(report), "shards": shards}


def _pack_documents(job: Job, unit: Unit, index: int, name: str) -> dict[str, Any]:
    stored = read_report(join(job.output, "documents", f"{job.documents_name(unit)}.json"))
    assert stored is not None  # filter_unit has run
    report = Report(**stored["report"])
    shards = _write_shards(job, name, _unique_items(job, unit, index, report), report)
    return {"name": name, "inputs": unit_inputs(unit), "report": asdict(report), "shards": shards}


def _unique_items(job: Job, unit: Unit, index: int, report: Report) -> Iterator[Item]:
    """The items of a unit whose documents, and lines, stand in the corpus for the first time."""
    config = job.config
    removed = removed_documents(job, index)
    lines: dict[int, list[int]] = {}
    if job.lines_dedup is not None:
        for position, number in zip(
            *read_removals(job.dedup_folder("lines"), job.lines_dedup, index), strict=True
        ):
            lines.setdefault(int(position), []).append(int(number))
    for position, document in timed(read_texts_of(job, unit), "store", report):
        root = removed.get(position)
        if root is not None:
            outcome = "duplicate" if root else "duplicate_of_earlier_snapshot"
            report.add(outcome, document, root or None)
            continue
        if position in lines:
            report.add_edits("duplicate_lines", len(lines[position]))
            rest = remove_lines(document.text, np.array(lines[position])).strip("\n")
            if len(rest) < max(1, config.read_of(unit.source).min_chars):
                report.add("duplicate_lines", document, len(lines[position]))
                continue
            document = replace(document, text=rest)
        yield split_of(document.text, config), document


def _write_shards(job: Job, name: str, items: Iterator[Item], report: Report) -> list[dict[str, Any]]:
    """Tokenise, pack and store; the shards as the index lists them. `report` learns what was kept."""
    tokenizer, size = _load_tokenizer(join(job.output, "tokenizer"), job.tokenizer_hash)
    pad_id = tokenizer.eos_token_id
    writers = {split: _ShardWriter(split, name, job, pad_id, size) for split in SPLITS}
    documents = Counter[str]()
    for (split, document), result in _encoded(items, job.config, tokenizer, report):
        fitting = [item for item in result if item is not None]
        if not fitting:
            report.add("example_longer_than_row", document)
            continue
        report.add_edits("examples_longer_than_row", len(result) - len(fitting))
        report.add(KEPT, document)
        tokens = fitting
        if job.config.kind == "sft":
            report.add_edits("truncated_prompts", sum(example.is_truncated for example in fitting))
            tokens = [example.tokens for example in fitting]
        report.add_length("tokens", sum(map(len, tokens)))
        documents[split] += 1
        for item in fitting:
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


@functools.lru_cache(maxsize=1)
def _load_tokenizer(url: str, tokenizer_hash: str) -> tuple[PreTrainedTokenizerFast, int]:
    """The tokenizer and its vocabulary's size, once per worker process; the hash tells a later tokenizer at the same
    place apart."""
    with tempfile.TemporaryDirectory() as copied:
        folder = local_path(url) or copied
        if folder == copied:
            for name in file_sizes(url):
                (Path(folder) / name).write_bytes(read_bytes(join(url, name)))
        tokenizer = load_tokenizer(folder)
    return tokenizer, vocab_size(tokenizer)


def _encoded(
    items: Iterator[Item], config: PrepareConfig, tokenizer: PreTrainedTokenizerFast, report: Report
) -> Iterator[tuple[Item, list]]:
    """Each item with what it adds to its split. A batch is encoded while the next one is read, which hides the waiting
    for a store, and in a thread of its own: a thread has its own memory arena, and among what a process has allocated
    before the tokenizers library is a tenth slower (measured with glibc)."""

    def encode(batch: list[Item]) -> tuple[list[list], float]:
        begun = time.thread_time()
        return _encode(batch, config, tokenizer), time.thread_time() - begun

    def finish(batch: list[Item], future: Future[tuple[list[list], float]]) -> Iterator[tuple[Item, list]]:
        encoded, seconds = future.result()
        report.add_seconds("tokenise", seconds)
        yield from zip(batch, encoded, strict=True)

    with ThreadPoolExecutor(1) as thread:
        running: tuple[list[Item], Future[tuple[list[list], float]]] | None = None
        for batch in batches(items, lambda item: item[1].size, _ENCODED_CHARS):
            ready, running = running, (batch, thread.submit(encode, batch))
            if ready:
                yield from finish(*ready)
        if running:
            yield from finish(*running)


def _encode(batch: list[Item], config: PrepareConfig, tokenizer: PreTrainedTokenizerFast) -> list[list]:
    """For each item what it adds to its split: one closed token array (pretrain), or its examples, None for one that
    does not fit a row."""
    if config.kind == "pretrain":
        eos = [tokenizer.eos_token_id]
        encoded = encode_texts(tokenizer, [document.text for _, document in batch])
        # array is three times as fast as np.array on a list.
        return [[np.frombuffer(array("I", ids + eos), dtype=np.uint32)] for ids in encoded]
    results: list[list] = []
    for _, document in batch:
        examples = (
            encode_example(tokenizer, history, answer, row_length=config.row_length, too_long=config.too_long)
            for history, answer in prompt_answer_pairs(document.messages)
        )
        results.append(list(examples))
    return results


class _ShardWriter:
    """Collects the rows of one split of one unit and writes a shard whenever one is full."""

    def __init__(self, split: str, name: str, job: Job, pad_id: int, size: int):
        self.split, self.name, self.config, self.output, self.pad_id = (
            split,
            name,
            job.config,
            job.output,
            pad_id,
        )
        self.counts = np.zeros(size, dtype=np.int64)
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
            examples = [(example.tokens, example.answer_start) for example in items]
            rows = one_per_row(examples, self.config.row_length, self.pad_id)
        else:
            pack = best_fit if self.config.packing == "best_fit" else concatenate_and_cut
            rows = pack(items, self.config.row_length, self.pad_id)
        shard = f"{self.split}/{self.name}-{len(self.shards):03d}.safetensors"
        self.shards.append(
            {"split": self.split, "name": shard, **write_shard(join(self.output, shard), rows)}
        )
        self.counts += np.bincount(answer_tokens(rows), minlength=len(self.counts))
