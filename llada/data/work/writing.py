"""One pass from the documents of a work unit to its shards: what the steps of it need, and what they fill."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from transformers import PreTrainedTokenizerFast

from llada.data.dedup.removal import Repeats, repeated_documents, repeated_lines
from llada.data.document import Document
from llada.data.outcomes import Report
from llada.data.tokens.encoding import Encoder
from llada.data.tokens.manifest import ShardEntry
from llada.data.tokens.packing import RowLayout
from llada.data.tokens.splits import SPLITS, split_of
from llada.data.tokens.writer import ShardWriter
from llada.data.work.job import PackJob
from llada.data.work.units import Unit
from llada.files import file_sizes, join, local_path, read_bytes, write_bytes
from llada.tokenizer import load_tokenizer, vocab_size


@dataclass(frozen=True)
class Writing:
    """A pass to the shards of unit `index`."""

    job: PackJob
    unit: Unit
    index: int
    report: Report

    @property
    def repeats(self) -> Repeats:
        """What the deduplication found of this unit."""
        removals, documents, lines = self.job.removals, {}, {}
        if removals.documents is not None:
            documents = repeated_documents(self.job.dedup_folder("documents"), removals.documents, self.index)
        if removals.lines is not None:
            lines = repeated_lines(self.job.dedup_folder("lines"), removals.lines, self.index)
        return Repeats(documents, lines)

    @property
    def min_chars(self) -> int:
        """Of a document that lost lines."""
        return self.job.config.read_of(self.unit.source).min_chars

    @property
    def encoder(self) -> Encoder:
        config = self.job.config
        return Encoder(self._tokenizer, config.kind, config.row_length, config.too_long)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        return _load_tokenizer(self.job.tokenizer_url, self.job.tokenizer_hash)

    def write(self, encoded: Iterable[tuple[Document, list[Any]]]) -> list[ShardEntry]:
        """Pack the documents of each split and write them, with how often each token is trained on."""
        config, name = self.job.config, self.job.shards_name(self.unit)
        size = vocab_size(self._tokenizer)
        layout = RowLayout(config.row_length, self._tokenizer.eos_token_id, config.packing, config.kind)
        stem = name + "-{:03d}"
        writers = {
            split: ShardWriter(
                self.job.output, split, stem, layout, config.rows_per_shard, size, self.unit.source
            )
            for split in SPLITS
        }
        documents = Counter[str]()
        for document, items in encoded:
            split = split_of(document, config.validation_fraction, config.split_seed)
            documents[split] += 1
            for item in items:
                writers[split].add(item)
        shards: list[ShardEntry] = []
        for split, writer in writers.items():
            own = writer.close()
            rows, tokens = sum(shard.rows for shard in own), sum(shard.tokens for shard in own)
            self.report.splits[split] = {"documents": documents[split], "rows": rows, "tokens": tokens}
            shards += own
        self.report.add_seconds("pack", sum(writer.seconds for writer in writers.values()))
        counts = writers["train"].counts
        seen = np.flatnonzero(counts)
        write_bytes(self.job.unigrams_url(self.unit), save({"ids": seen, "counts": counts[seen]}))
        return shards


@functools.lru_cache(maxsize=1)
def _load_tokenizer(url: str, tokenizer_hash: str) -> PreTrainedTokenizerFast:
    """Once per worker process; the hash tells a later tokenizer at the same place apart."""
    with tempfile.TemporaryDirectory() as copied:
        folder = local_path(url) or copied
        if folder == copied:
            for name in file_sizes(url):
                (Path(folder) / name).write_bytes(read_bytes(join(url, name)))
        return load_tokenizer(folder)
