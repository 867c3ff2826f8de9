"""The documents of a work unit at the barrier: stored with their keys, and read back.

documents/<name>.parquet holds what later steps need of a document: its text, language and place.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llada.data.batching import batches
from llada.data.dedup.minhash import MinHasher
from llada.data.dedup.steps import DedupConfig, document_rows, write_unit_rows
from llada.data.document import Document
from llada.data.outcomes import Report
from llada.errors import UserError
from llada.files import filesystem, writing

_SCHEMA = pa.schema([("text", pa.large_string()), ("language", pa.string()), ("place", pa.string())])


def store_documents(
    documents: Iterable[Document], url: str, keys_url: str, dedup: DedupConfig, report: Report
) -> tuple[int, int]:
    """Store the documents in row groups of a batch each, and the keys to compare; (documents, keys)."""
    hasher = MinHasher(dedup.ngram, dedup.bands, dedup.rows, dedup.seed)
    keys, count = [np.empty((0, 2), np.uint64)], 0
    with writing(url) as path, pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        for batch in batches(documents, lambda document: len(document.text)):
            begun = time.thread_time()
            columns = {name: [getattr(document, name) for document in batch] for name in _SCHEMA.names}
            writer.write_table(pa.table(columns, schema=_SCHEMA))
            report.add_seconds("store", time.thread_time() - begun)
            begun = time.thread_time()
            rows = document_rows(columns["text"], dedup, hasher)
            report.add_seconds("minhash", time.thread_time() - begun)
            rows[:, 1] += np.uint64(count)
            keys.append(rows)
            count += len(batch)
    return count, write_unit_rows(keys_url, np.concatenate(keys))


def stored_documents(url: str) -> Iterator[Document]:
    """All documents that were stored at `url`, in order."""
    fs, path = filesystem(url)
    with fs.open(path, "rb") as stream:
        for batch in pq.ParquetFile(stream).iter_batches(1024):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield _document(row)


def stored_document(url: str, position: int) -> Document:
    """The document at a position; its row group alone is read."""
    fs, path = filesystem(url)
    with fs.open(path, "rb") as stream:
        file = pq.ParquetFile(stream)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if position < rows:
                row = file.read_row_group(group).slice(position, 1)
                return _document(tuple(column[0].as_py() for column in row.columns))
            position -= rows
    raise UserError(
        f"{path} ends before the document that is asked for; delete documents/ and run prepare again"
    )


def _document(row: tuple[Any, ...]) -> Document:
    text, language, place = row
    return Document(text, place, language=language)
