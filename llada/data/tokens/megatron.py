"""Token shards to and from Megatron-LM's indexed dataset: PREFIX.bin (tokens) and PREFIX.idx (where each one lies).

The index, little-endian:
    "MMIDIDX\\0\\0" · u64 version 1 · u8 dtype code · u64 S sequences · u64 D + 1
    i32 (S,) tokens of each sequence · i64 (S,) its first byte in .bin · i64 (D + 1,) sequences before each document, S
Here a document is one sequence, which is what GPT data sets sample. Source: megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load

from llada.data.tokens.manifest import ShardEntry, load_dataset_entry, read_index, resolve_snapshot
from llada.data.tokens.packing import PackedRows, Packing, RowLayout, answer_tokens
from llada.data.tokens.writer import ShardWriter, Target
from llada.errors import UserError
from llada.files import (
    entry_at,
    exists,
    filesystem,
    join,
    local_path,
    open_seekable,
    read_bytes,
    storage_errors,
    write_bytes,
)
from llada.store_errors import StoreError

_HEAD = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
# By Megatron's code; the others hold no token ids.
_DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_LARGEST_U16_VOCABULARY = 65_535


class _Index(NamedTuple):
    """A checked .idx: S sequences of D documents; document d is the sequences documents[d]:documents[d + 1]."""

    dtype: np.dtype
    lengths: np.ndarray
    """(S,) tokens"""
    pointers: np.ndarray
    """(S,) bytes"""
    documents: np.ndarray
    """(D + 1,)"""


# --- Export -----------------------------------------------------------------------------------------------------------


def export_megatron(data_url: str, split: str, prefix: str) -> dict[str, int]:
    """Write the documents of one split of a prepared folder as PREFIX.bin and PREFIX.idx, at any fsspec URL.

    Returns {documents, tokens, bytes}. The shards do not record which document goes on in which row. Of
    concatenate-and-cut rows, the documents come back whole: one ends where a segment ends in the EOS token or before
    the end of its row. Of best-fit rows (the manifest's `packing`), every segment becomes a document: the pieces of one
    longer than a row lie apart. Stored rows are written once, whatever the passes of a mixture. The index is written
    last and removed first, so what has one is complete. One shard is in memory at a time.
    Raises UserError for SFT data, whose answer masks the format has no place for.
    """
    data_url = resolve_snapshot(data_url)
    info = load_dataset_entry(data_url)
    if info.kind != "pretrain":
        raise UserError(
            f"{data_url} holds {info.kind} data; Megatron's format has no answer masks: export pretraining data"
        )
    code = 4 if info.vocab_size > _LARGEST_U16_VOCABULARY else 8
    ends, written = [np.zeros(1, dtype=np.int64)], 0  # in tokens from the start of the file
    with storage_errors(f"{prefix}.bin"):
        fs, path = filesystem(f"{prefix}.bin")
        fs.makedirs(fs._parent(path), exist_ok=True)
        if exists(f"{prefix}.idx"):
            fs.rm_file(filesystem(f"{prefix}.idx")[1])
        with fs.open(path, "wb") as stream:
            for name in read_index(data_url, split)["name"].to_pylist():
                rows = PackedRows(**load(read_bytes(join(data_url, info.root, name))))
                last = rows.segments[:, 2]
                row = np.repeat(np.arange(len(rows.tokens)), np.diff(rows.segment_offsets).astype(np.int64))
                closed = (last < info.row_length) | (rows.tokens[row, last - 1] == info.eos_token_id)
                if info.packing == "best_fit":
                    closed[:] = True
                segment_ends = np.cumsum(last - rows.segments[:, 0], dtype=np.int64) + written
                ends.append(segment_ends[closed])
                tokens = answer_tokens(rows)  # in pretraining all but the padding
                stream.write(tokens.astype(_DTYPES[code]).tobytes())
                written += len(tokens)
    borders = np.unique(np.concatenate([*ends, [written]]))  # a last document without EOS ends here
    lengths = np.diff(borders)
    _write_index(f"{prefix}.idx", code, lengths)
    return {"documents": len(lengths), "tokens": written, "bytes": written * _DTYPES[code].itemsize}


def _write_index(url: str, code: int, lengths: np.ndarray) -> None:
    """The .idx of documents of `lengths` (D,) tokens, one sequence each, that lie one after the other."""
    pointers = (np.cumsum(lengths) - lengths) * _DTYPES[code].itemsize
    arrays = (lengths.astype("<i4"), pointers.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8"))
    head = _HEAD.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1)
    write_bytes(url, head + b"".join(array.tobytes() for array in arrays))


# --- Import -----------------------------------------------------------------------------------------------------------


def _read_index(prefix: str) -> _Index:
    """PREFIX.idx, checked against itself and the size of PREFIX.bin. Raises UserError naming what is wrong with it."""
    url = f"{prefix}.idx"
    local, binary = local_path(url), entry_at(f"{prefix}.bin")
    try:
        data = np.memmap(local, np.uint8, "r") if local else np.frombuffer(read_bytes(url), np.uint8)
        if binary is None:
            raise FileNotFoundError
    except FileNotFoundError:
        raise UserError(f"no {prefix}.idx and .bin; give their common path without the ending") from None
    except StoreError:
        raise
    except ValueError:  # a memory map cannot be empty
        data = np.empty(0, np.uint8)
    if bytes(data[:9]) != _MAGIC:
        raise UserError(f"{url} is no Megatron index (it does not begin with MMIDIDX); check the path")
    if len(data) < _HEAD.size:
        raise UserError(f"{url} ends in its header; copy it again")
    _, version, code, sequences, borders = _HEAD.unpack(bytes(data[: _HEAD.size]))
    if version != _VERSION or code not in _DTYPES:
        known = ", ".join(f"{c} ({dtype.name})" for c, dtype in _DTYPES.items())
        raise UserError(
            f"{url} has version {version} and dtype code {code}; readable: version 1, codes {known}"
        )
    expected = _HEAD.size + 12 * sequences + 8 * borders
    if len(data) != expected:
        raise UserError(
            f"{url} has {len(data)} bytes instead of {expected}; copy it again (multimodal sets are not read)"
        )
    lengths_end, pointers_end = _HEAD.size + 4 * sequences, _HEAD.size + 12 * sequences
    lengths = data[_HEAD.size : lengths_end].view("<i4")
    pointers = data[lengths_end:pointers_end].view("<i8")
    documents = data[pointers_end:].view("<i8")
    dtype = _DTYPES[code]
    inside = borders and documents[0] == 0 and documents[-1] == sequences and (np.diff(documents) >= 0).all()
    if not inside or (lengths < 0).any() or (pointers < 0).any():
        raise UserError(f"{url} is damaged: its lengths, pointers or documents make no sense; copy it again")
    needed = int((pointers + lengths.astype(np.int64) * dtype.itemsize).max(initial=0))
    available = binary["size"] if binary else None
    if available is not None and available < needed:
        raise UserError(f"{prefix}.bin has {available} bytes, its index needs {needed}; copy it again")
    return _Index(dtype, lengths, pointers, documents)


def import_megatron(prefix: str) -> Iterator[np.ndarray]:
    """The documents of PREFIX.bin, uint32 (tokens,), in order; the sequences of a document are joined.

    Read as a stream from any fsspec URL. Raises UserError for a damaged index or file, or for a negative token.
    """
    index = _read_index(prefix)
    with storage_errors(f"{prefix}.bin"), open_seekable(f"{prefix}.bin") as stream:
        for number, (first, end) in enumerate(zip(index.documents[:-1], index.documents[1:], strict=True)):
            pieces = []
            for sequence in range(first, end):
                stream.seek(int(index.pointers[sequence]))
                pieces.append(stream.read(int(index.lengths[sequence]) * index.dtype.itemsize))
            tokens = np.frombuffer(b"".join(pieces), dtype=index.dtype)
            if len(tokens) and tokens.min() < 0:
                raise UserError(f"{prefix}.bin: document {number} holds {tokens.min()}, which is no token")
            yield tokens.astype(np.uint32)


def import_megatron_shards(
    prefix: str,
    output: str,
    *,
    split: str,
    row_length: int,
    vocab_size: int,
    eos_id: int,
    packing: Packing = "concatenate_and_cut",
    rows_per_shard: int = 16384,
) -> tuple[list[ShardEntry], np.ndarray]:
    """Make token shards OUTPUT/<split>/megatron-00000.safetensors ... of the documents of PREFIX.

    Returns (the shards, how often each token occurs: int64 (vocab_size,)). A document that
    does not end in EOS gets one, as our own shards have it; empty ones are left out. Padding is EOS. With "best_fit",
    shards have about `rows_per_shard` rows. Raises UserError when a token is not below `vocab_size`.
    """
    layout = RowLayout(row_length, eos_id, packing)
    writer = ShardWriter(split, Target(output, "megatron-{:05d}", layout, rows_per_shard, vocab_size))
    for number, document in enumerate(import_megatron(prefix)):
        if not len(document):
            continue
        if document.max() >= vocab_size:
            raise UserError(
                f"{prefix}.bin: document {number} holds token {document.max()}, the tokenizer has {vocab_size}; "
                "give the tokenizer that the tokens were made with"
            )
        writer.add(document if document[-1] == eos_id else np.append(document, np.uint32(eos_id)))
    return writer.close(), writer.counts
