"""One pass from the documents of a work unit to its shards: what the steps of it need."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llada.data.dedup.removal import Repeats, repeated_documents, repeated_lines
from llada.data.outcomes import Report
from llada.data.tokens.encoding import Encoder
from llada.data.tokens.packing import RowLayout
from llada.data.tokens.writer import Target
from llada.data.work.job import PackJob
from llada.data.work.units import Unit
from llada.files import file_sizes, join, local_path, read_bytes
from llada.tokenizer import load_tokenizer, vocab_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
        return Encoder(
            self._tokenizer, config.kind, config.row_length, config.too_long, config.turns, config.split_seed
        )

    @property
    def target(self) -> Target:
        config = self.job.config
        return Target(
            root=self.job.output,
            stem=self.job.shards_name(self.unit) + "-{:03d}",
            layout=RowLayout(config.row_length, self._tokenizer.eos_token_id, config.packing, config.kind),
            rows_per_shard=config.rows_per_shard,
            vocab_size=vocab_size(self._tokenizer),
            validation_fraction=config.validation_fraction,
            split_seed=config.split_seed,
            source=self.unit.source,
        )

    @property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        return _load_tokenizer(self.job.tokenizer_url, self.job.tokenizer_hash)


@functools.lru_cache(maxsize=1)
def _load_tokenizer(url: str, tokenizer_hash: str) -> PreTrainedTokenizerFast:
    """Once per worker process; the hash tells a later tokenizer at the same place apart."""
    with tempfile.TemporaryDirectory() as copied:
        folder = local_path(url) or copied
        if folder == copied:
            for name in file_sizes(url):
                (Path(folder) / name).write_bytes(read_bytes(join(url, name)))
        return load_tokenizer(folder)
