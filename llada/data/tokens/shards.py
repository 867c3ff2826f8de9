"""Token shards: the format on disk and the loader by row index.

One shard is one uncompressed safetensors file (R rows of L tokens, S segments; see packing.py for their meaning):
    tokens uint32 (R, L) · segments uint32 (S, 3) · segment_offsets uint64 (R + 1,)
A row is a byte range, so any row is read at the same cost, from a local disk or an object store. Which shards there are
stands in the folder's manifest and the lists that it names (manifest.py).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import save

from llada.data.tokens.manifest import (
    REMEDY,
    ShardEntry,
    ShardError,
    load_dataset_entry,
    read_index,
    resolve_snapshot,
)
from llada.data.tokens.packing import PackedRows
from llada.files import (
    TensorPlace,
    fetch_ranges,
    join,
    local_path,
    read_bytes,
    safetensors_layout,
    write_bytes,
)
from llada.store_errors import StoreError

FORMAT = "llada-tokens-1"
UNIGRAM_COUNTS = "unigram_counts.npy"
_DTYPES: dict[str, np.dtype] = {"U32": np.dtype("<u4"), "U64": np.dtype("<u8")}
_HEADER_BYTES = 4096  # of which a shard's header needs about 400
_OPEN_SHARDS = 256  # a memory map holds a file descriptor, a remote index some memory


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


@dataclass(frozen=True)
class _Shard:
    """One opened shard: its segments in memory (or mapped), its tokens mapped (local) or as a place (remote)."""

    url: str
    segments: np.ndarray
    segment_offsets: np.ndarray
    tokens: np.ndarray | None
    tokens_start: int


def write_shard(root: str, split: str, stem: str, rows: PackedRows, source: str = "") -> ShardEntry:
    """Write `root`/<split>/<stem>.safetensors, all or nothing; the shard as a list of shards describes it."""
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
        self._bytes = index["bytes"].to_numpy()
        self._ends = np.cumsum(index["rows"].to_numpy())
        digest = hashlib.sha256(json.dumps(sorted(epochs.items())).encode())
        for column in ("name", "sha256"):
            digest.update("\n".join(index[column].to_pylist()).encode())
        self.fingerprint = digest.hexdigest()[:32]
        self._passes = _passes(index, epochs)
        self._open = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return int(self._passes[-1].end) if self._passes else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.split)  # open files stay behind when a dataset travels to a worker

    def lengths(self, indices: np.ndarray, epochs: np.ndarray | int = 0) -> np.ndarray:
        """Columns in use, int64 (B,): up to the end of a row's last segment, without the padding."""
        return _columns_used(self._segments(self._locate(indices, epochs)))

    def rows(self, indices: np.ndarray, pad_to: int | None = None, epochs: np.ndarray | int = 0) -> Rows:
        """The rows at `indices` (B,) in the `epochs` (B,) of the mixture, in that order.

        Pretraining and "unified": maskable is every column of a segment, segment_ids count the documents of a row from 0.
        SFT (LLaDA's rules): the EOS padding belongs to the answer, so maskable is every column from the answer's
        start on, and all segment_ids are 0; `pad_to` keeps only the first columns (it must hold the longest row).
        """
        if pad_to is not None and self.kind != "sft":
            raise ValueError("pad_to is for SFT data: rows of pretraining data are full")
        columns = self.row_length if pad_to is None else pad_to
        places = self._locate(indices, epochs)
        segments = self._segments(places)
        lengths = _columns_used(segments)
        if columns > self.row_length or (len(lengths) and columns < lengths.max()):
            raise ValueError(
                f"pad_to={columns} must lie between the longest row ({lengths.max()}) and {self.row_length}"
            )
        tokens = self._tokens(places)[:, :columns].astype(np.int64)
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

    def _locate(self, indices: np.ndarray, epochs: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """(shard number, row inside it) of each index."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(
                f"row {indices.min()}..{indices.max()} is outside 0..{len(self) - 1} of {self.url} {self.split}"
            )
        indices = self._stored_rows(indices, np.broadcast_to(epochs, indices.shape))
        shard = np.searchsorted(self._ends, indices, side="right")
        return shard, indices - np.concatenate([[0], self._ends])[shard]

    def _stored_rows(self, indices: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The places of `indices` (B,) in `epochs` (B,) among all stored rows."""
        rows = np.empty_like(indices)
        for source in self._passes:
            here = (indices >= source.start) & (indices < source.end)
            place = indices[here] - source.start
            whole = (source.end - source.start) // source.rows * source.rows
            rest = max(1, source.end - source.start - whole)
            spread = ((place - whole) * source.rows // rest + epochs[here]) % source.rows
            rows[here] = source.first + np.where(place < whole, place % source.rows, spread)
        return rows

    def _segments(self, places: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
        """The (S_row, 3) segments of each row at `places` (see `_locate`)."""
        segments = []
        for number, row in zip(*places, strict=True):
            shard = self._open(int(number))
            start, end = int(shard.segment_offsets[row]), int(shard.segment_offsets[row + 1])
            segments.append(shard.segments[start:end])
        return segments

    def _tokens(self, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """uint32 (B, L). Rows of remote shards come in one request call for the whole batch."""
        tokens = np.empty((len(places[0]), self.row_length), dtype=np.uint32)
        width = self.row_length * 4
        remote: list[tuple[int, str, int]] = []
        for slot, (number, row) in enumerate(zip(*places, strict=True)):
            shard = self._open(int(number))
            if shard.tokens is not None:
                tokens[slot] = shard.tokens[row]
            else:
                remote.append((slot, shard.url, shard.tokens_start + int(row) * width))
        if remote:
            ranges = [(url, start, start + width) for _, url, start in remote]
            for (slot, url, _), data in zip(remote, fetch_ranges(ranges), strict=True):
                tokens[slot] = _array(url, data, np.dtype("<u4"), (self.row_length,))
        return tokens

    def _open_shard(self, number: int) -> _Shard:
        url, size = join(self._root, self._names[number].as_py()), int(self._bytes[number])
        path = local_path(url)
        try:
            if path is not None:
                mapped = np.memmap(path, dtype=np.uint8, mode="r")
                if len(mapped) != size:
                    raise ShardError(f"{url} has {len(mapped)} bytes instead of {size}; {REMEDY}")
                places = _layout(url, bytes(mapped[:_HEADER_BYTES]))
                arrays = {
                    name: mapped[place.start : place.end].view(_DTYPES[place.dtype]).reshape(place.shape)
                    for name, place in places.items()
                }
                return _Shard(url, arrays["segments"], arrays["segment_offsets"], arrays["tokens"], 0)
            places = _layout(url, fetch_ranges([(url, 0, min(_HEADER_BYTES, size))])[0])
            index = [places["segments"], places["segment_offsets"]]
            pieces = fetch_ranges([(url, place.start, place.end) for place in index])
            segments, offsets = (
                _array(url, piece, _DTYPES[place.dtype], place.shape)
                for place, piece in zip(index, pieces, strict=True)
            )
            return _Shard(url, segments, offsets, None, places["tokens"].start)
        except FileNotFoundError:
            raise ShardError(f"missing shard {url}; {REMEDY}") from None


@dataclass(frozen=True)
class _Passes:
    """One source: its indices start .. end - 1 stand for the stored rows first .. first + rows - 1."""

    start: int
    end: int
    first: int
    rows: int


def _columns_used(segments: list[np.ndarray]) -> np.ndarray:
    """Where the last segment of each row ends, int64 (B,)."""
    return np.array([bounds[-1, 2] if len(bounds) else 0 for bounds in segments], dtype=np.int64)


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


def _array(url: str, data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if len(data) != dtype.itemsize * int(np.prod(shape)):
        raise ShardError(f"{url} is shorter than its manifest says; {REMEDY}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _layout(url: str, head: bytes) -> dict[str, TensorPlace]:
    """The places of a shard's arrays, from the head of its file."""
    try:
        metadata, places = safetensors_layout(head)
        if metadata.get("format") == FORMAT and all(place.dtype in _DTYPES for place in places.values()):
            return places
    except ValueError:
        pass
    raise ShardError(f"{url} is no {FORMAT} shard or is damaged; {REMEDY}")
