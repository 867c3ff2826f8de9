"""Token shards: the format on disk and the loader by row index.

One shard is one uncompressed safetensors file (R rows of L tokens, S segments; see packing.py for their meaning). Behind
its header lie, in the order that safetensors gives them, up to the end of the file:
    segment_offsets uint64 (R + 1,) · segments uint32 (S, 3) · tokens uint32 (R, L)
Which shards there are, with their R, S and bytes, stands in the folder's manifest and the lists that it names
(manifest.py). So a row is three byte ranges whose places are known before the shard is opened, but for the number of its
segments: the rows of a batch are read in two calls, from a local disk or an object store, one for the offsets and one for
segments and tokens; of SFT data, where row and segment are one, in one.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import save

from llada.data.tokens.manifest import (
    LENGTHS,
    REMEDY,
    ShardEntry,
    ShardError,
    load_dataset_entry,
    read_index,
    resolve_snapshot,
)
from llada.data.tokens.packing import PackedRows
from llada.files import absolute, fetch_ranges, join, local_path, read_bytes, safetensors_layout, write_bytes
from llada.store_errors import StoreError

FORMAT = "llada-tokens-1"
UNIGRAM_COUNTS = "unigram_counts.npy"
_OFFSET, _ID = np.dtype("<u8"), np.dtype("<u4")
_SEGMENT_BYTES = 3 * _ID.itemsize
_HEADER_BYTES = 4096  # of which a shard's header needs about 400
_OPEN_SHARDS = 256  # a memory map holds a file descriptor
# How long rows are waited for while their store is away. It was there when the list of shards was read, and what waits
# for it may be hundreds of GPUs, whose restart would take minutes and find it away as well.
_OUTAGE_S = 1800.0


@dataclass(frozen=True)
class Rows:
    """A batch of B rows, L columns. Padding is neither in a segment nor, in pretraining, maskable."""

    tokens: np.ndarray
    """int64 (B, L)"""
    segment_ids: np.ndarray
    """int32 (B, L), -1 on padding"""
    maskable: np.ndarray
    """bool (B, L)"""
    lengths: np.ndarray
    """int64 (B,), columns up to the end of the last segment"""


def write_shard(
    root: str, split: str, stem: str, rows: PackedRows, source: str = "", *, list_lengths: bool = False
) -> ShardEntry:
    """Write `root`/<split>/<stem>.safetensors, all or nothing; the shard as a list of shards describes it, with the lengths
    of its rows if they are asked for (of rows that hold a segment each)."""
    name = f"{split}/{stem}.safetensors"
    arrays = {"tokens": rows.tokens, "segments": rows.segments, "segment_offsets": rows.segment_offsets}
    data = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata={"format": FORMAT})
    write_bytes(join(root, name), data)
    return ShardEntry(
        split=split,
        name=name,
        rows=len(rows.tokens),
        segments=len(rows.segments),
        tokens=int((rows.segments[:, 2].astype(np.int64) - rows.segments[:, 0]).sum()),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        source=source,
        lengths=rows.segments[:, 2].tolist() if list_lengths else None,
    )


def load_unigram_counts(url: str) -> np.ndarray:
    """How often each token is trained on in the train split, int64 (V,), of a prepared folder.

    Raises ShardError when the file is missing or is no such array.
    """
    path = join(resolve_snapshot(url), UNIGRAM_COUNTS)
    try:
        return np.load(io.BytesIO(read_bytes(path)))
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; {REMEDY}") from None
    except StoreError:
        raise
    except (ValueError, EOFError) as error:
        raise ShardError(f"{path} is damaged ({error}); {REMEDY}") from None


def write_unigram_counts(url: str, counts: np.ndarray) -> bytes:
    """Write what `load_unigram_counts` reads into the folder `url`; the file's bytes."""
    buffer = io.BytesIO()
    np.save(buffer, counts)
    write_bytes(join(url, UNIGRAM_COUNTS), buffer.getvalue())
    return buffer.getvalue()


class TokenDataset:
    """The rows of one split of a prepared folder, by index. Nothing but the lists of shards is read before the first row.

    In a mixture a source of n rows that is to come e times in a pass (`epochs` of the manifest, training split) has
    round(e · n) indices: each row once for every whole pass, and for the rest rows evenly spread over it, in the next
    epoch of the mixture the ones after these. Sources stand one after the other; the order of training is a permutation
    of all indices.

    Attributes: `kind` ("pretrain", "sft" or "unified"), `row_length`, `fingerprint` (hash of the shards' names, checksums and
    passes: equal fingerprints mean equal rows in equal order), `info` (a `DatasetEntry`: what the manifest says).
    """

    def __init__(self, url: str, split: str = "train") -> None:
        self.url, self.split = resolve_snapshot(url), split
        self.info = load_dataset_entry(self.url)
        self.kind, self.row_length = self.info.kind, self.info.row_length
        index = read_index(self.url, split)
        epochs = self.info.epochs if split == "train" else {}
        if epochs:
            index = index.take(pc.sort_indices(index["source"])).combine_chunks()  # stable
        self._names, self._root = index["name"], join(self.url, self.info.root)
        self._is_local = local_path(self._root) is not None
        stored, segments = index["rows"].to_numpy(), index["segments"].to_numpy()
        self._bytes, self._segments = index["bytes"].to_numpy(), segments
        self._ends = np.cumsum(stored)
        self._tokens_at = self._bytes - stored * self.row_length * _ID.itemsize
        self._segments_at = self._tokens_at - segments * _SEGMENT_BYTES
        self._offsets_at = self._segments_at - (stored + 1) * _OFFSET.itemsize
        self._lengths = _listed_lengths(index, self.url)
        digest = hashlib.sha256(json.dumps(sorted(epochs.items())).encode())
        for column in ("name", "sha256"):
            digest.update("\n".join(index[column].to_pylist()).encode())
        self.fingerprint = digest.hexdigest()[:32]
        self._passes = _passes(index, epochs)
        self._mapped = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._map_shard)

    def __len__(self) -> int:
        return int(self._passes[-1].end) if self._passes else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.split)  # open files stay behind when a dataset travels to a worker

    def lengths(self, indices: np.ndarray, epochs: np.ndarray | int = 0) -> np.ndarray:
        """Columns in use, int64 (B,): up to the end of a row's last segment, without the padding. Of SFT data they stand in
        the lists of shards (those of earlier versions apart), and no shard is read."""
        stored = self._stored_rows(indices, epochs)
        lengths = np.zeros(len(stored), dtype=np.int64)
        if self._lengths is not None:
            lengths[:] = self._lengths[stored]
        if (unknown := np.flatnonzero(lengths == 0)).size:
            segments, _ = self._read(stored[unknown], 0)
            lengths[unknown] = _columns_used(segments)
        return lengths

    def rows(self, indices: np.ndarray, pad_to: int | None = None, epochs: np.ndarray | int = 0) -> Rows:
        """The rows at `indices` (B,) in the `epochs` (B,) of the mixture, in that order.

        Pretraining and "unified": maskable is every column of a segment, segment_ids count the documents of a row from 0.
        SFT (LLaDA's rules): the EOS padding belongs to the answer, so maskable is every column from the answer's
        start on, and all segment_ids are 0; `pad_to` keeps only the first columns (it must hold the longest row).
        """
        if pad_to is not None and self.kind != "sft":
            raise ValueError("pad_to is for SFT data: rows of pretraining data are full")
        columns = self.row_length if pad_to is None else pad_to
        segments, tokens = self._read(self._stored_rows(indices, epochs), min(columns, self.row_length))
        lengths = _columns_used(segments)
        if columns > self.row_length or columns < lengths.max(initial=0):
            raise ValueError(
                f"pad_to={columns} must lie between the longest row ({lengths.max(initial=0)}) and {self.row_length}"
            )
        tokens = tokens.astype(np.int64)
        column = np.arange(columns)
        if self.kind == "sft":
            answer_start = np.array([s[0, 1] for s in segments], dtype=np.int64).reshape(-1, 1)
            return Rows(tokens, np.zeros(tokens.shape, np.int32), column >= answer_start, lengths)
        segment_ids = np.full(tokens.shape, -1, dtype=np.int32)
        maskable = np.zeros(tokens.shape, dtype=bool)
        for row, bounds in enumerate(segments):
            for number, (start, answer_start, end) in enumerate(bounds):
                segment_ids[row, start:end] = number
                maskable[row, answer_start:end] = True
        return Rows(tokens, segment_ids, maskable, lengths)

    def _stored_rows(self, indices: np.ndarray, epochs: np.ndarray | int) -> np.ndarray:
        """The places of `indices` (B,) in `epochs` (B,) among all stored rows, int64 (B,)."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(
                f"row {indices.min()}..{indices.max()} is outside 0..{len(self) - 1} of {self.url} {self.split}"
            )
        epochs = np.broadcast_to(epochs, indices.shape)
        rows = np.empty_like(indices)
        for source in self._passes:
            here = (indices >= source.start) & (indices < source.end)
            place = indices[here] - source.start
            whole = (source.end - source.start) // source.rows * source.rows
            rest = max(1, source.end - source.start - whole)
            spread = ((place - whole) * source.rows // rest + epochs[here]) % source.rows
            rows[here] = source.first + np.where(place < whole, place % source.rows, spread)
        return rows

    def _read(self, stored: np.ndarray, columns: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Of the rows at the places `stored` (B,): the segments (S_row, 3) of each, and the first columns of their tokens,
        uint32 (B, columns)."""
        shards = np.searchsorted(self._ends, stored, side="right")
        rows = stored - np.concatenate([[0], self._ends])[shards]
        first, last = rows, rows + 1
        if self.kind != "sft":
            begin = self._offsets_at[shards] + rows * _OFFSET.itemsize
            offsets = self._fetch(shards, begin, begin + 2 * _OFFSET.itemsize)
            first, last = np.frombuffer(b"".join(offsets), _OFFSET).reshape(-1, 2).astype(np.int64).T
            self._require_sound(shards, (first >= 0) & (first < last) & (last <= self._segments[shards]))
        begin = self._segments_at[shards]
        tokens_begin = self._tokens_at[shards] + rows * self.row_length * _ID.itemsize
        pieces = self._fetch(
            np.concatenate([shards, shards]),
            np.concatenate([begin + first * _SEGMENT_BYTES, tokens_begin]),
            np.concatenate([begin + last * _SEGMENT_BYTES, tokens_begin + columns * _ID.itemsize]),
        )
        segments = [np.frombuffer(piece, _ID).reshape(-1, 3) for piece in pieces[: len(rows)]]
        tokens = np.frombuffer(b"".join(pieces[len(rows) :]), _ID).reshape(len(rows), columns)
        # On a GPU an id without a row in the embedding would end the process, and not say where it is from.
        self._require_sound(shards, tokens.max(1, initial=0) < (self.info.vocab_size or 1 << 32))
        if segments:
            start, answer_start, end = np.concatenate(segments).T
            is_ordered = (start <= answer_start) & (answer_start <= end) & (start < end)
            self._require_sound(np.repeat(shards, last - first), is_ordered & (end <= self.row_length))
        return segments, tokens

    def _fetch(self, shards: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> list[Any]:
        """The bytes start .. end - 1 of `shards` (n,), each as a buffer."""
        ranges = list(zip(shards.tolist(), starts.tolist(), ends.tolist(), strict=True))
        if self._is_local:
            return [self._mapped(shard)[start:end] for shard, start, end in ranges]
        try:
            pieces = fetch_ranges(
                [(self._shard_url(shard), start, end) for shard, start, end in ranges], outage_s=_OUTAGE_S
            )
        except FileNotFoundError as error:
            raise ShardError(f"missing shard: {error}; {REMEDY}") from None
        for (shard, start, end), piece in zip(ranges, pieces, strict=True):
            if len(piece) < end - start:
                raise ShardError(f"{self._shard_url(shard)} is shorter than its manifest says; {REMEDY}")
        return pieces

    def _require_sound(self, shards: np.ndarray, is_sound: np.ndarray) -> None:
        if not is_sound.all():
            url = self._shard_url(shards[np.argmin(is_sound)])
            raise ShardError(f"{url} is damaged: what it holds of its rows makes no sense; {REMEDY}")

    def _shard_url(self, number: int) -> str:
        return join(self._root, self._names[int(number)].as_py())

    def _map_shard(self, number: int) -> np.ndarray:
        """uint8 (bytes,): a shard on this machine, whose header is looked at since that costs nothing here."""
        url, size = self._shard_url(number), int(self._bytes[number])
        path = absolute(url)
        try:
            found = os.path.getsize(path)
        except FileNotFoundError:
            raise ShardError(f"missing shard: no file at {url}; {REMEDY}") from None
        if found != size:
            raise ShardError(f"{url} has {found} bytes instead of {size}; {REMEDY}")
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        try:
            metadata, places = safetensors_layout(bytes(mapped[:_HEADER_BYTES]))
            begins = tuple(places[name].start for name in ("segment_offsets", "segments", "tokens"))
        except (ValueError, KeyError):
            metadata, begins = {}, ()
        expected = (self._offsets_at[number], self._segments_at[number], self._tokens_at[number])
        if metadata.get("format") != FORMAT or begins != expected:
            raise ShardError(f"{url} is no {FORMAT} shard or is damaged; {REMEDY}")
        return mapped


@dataclass(frozen=True)
class _Passes:
    """One source: its indices start .. end - 1 stand for the stored rows first .. first + rows - 1."""

    start: int
    end: int
    first: int
    rows: int


def _columns_used(segments: list[np.ndarray]) -> np.ndarray:
    """Where the last segment of each row ends, int64 (B,)."""
    return np.array([bounds[-1, 2] for bounds in segments], dtype=np.int64)


def _listed_lengths(index: pa.Table, url: str) -> np.ndarray | None:
    """uint32 (R,) of all stored rows in their order, 0 where they are not listed; None where none is."""
    if LENGTHS.name not in index.column_names:
        return None
    column, rows = index[LENGTHS.name], index["rows"].to_numpy()
    is_listed = column.is_valid().to_numpy()
    if not np.array_equal(pc.list_value_length(column.drop_null()).to_numpy(), rows[is_listed]):
        raise ShardError(
            f"a list of shards in {url} is damaged: it has not one length for each row; {REMEDY}"
        )
    lengths = np.zeros(int(rows.sum()), dtype=np.uint32)
    lengths[np.repeat(is_listed, rows)] = pc.list_flatten(column).to_numpy()
    return lengths


def _passes(index: pa.Table, epochs: Mapping[str, float]) -> list[_Passes]:
    """The sources of a list of shards (sorted by source, unless all rows come once)."""
    rows = index["rows"].to_numpy()
    if not epochs:
        return [_Passes(0, int(rows.sum()), 0, int(rows.sum()))] if rows.sum() else []
    passes: list[_Passes] = []
    names = index["source"].to_numpy(zero_copy_only=False)
    first = start = 0
    for name in dict.fromkeys(names.tolist()):
        stored = int(rows[names == name].sum())
        count = round(epochs.get(name, 1.0) * stored)
        if count:
            passes.append(_Passes(start, start + count, first, stored))
        first, start = first + stored, start + count
    return passes
