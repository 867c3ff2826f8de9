"""What a prepared folder says of itself: the "dataset" entry of its manifest.json, and the lists of its shards.

Shards are listed in parquet files (an index: a line per shard, see INDEX_SCHEMA), which the entry names. Indexes are named
relative to the folder, shards to the entry's `root`. A corpus that grows has such a folder for each snapshot,
snapshots/0000 and so on; the manifest at its top names the newest in "snapshot".
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from typing import TYPE_CHECKING, Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from llada.data.tokens.packing import Kind
from llada.errors import UserError
from llada.files import join, read_bytes, sha256, writing
from llada.store_errors import StoreError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MANIFEST = "manifest.json"
INDEX_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("source", pa.string()),
        ("rows", pa.int64()),
        ("segments", pa.int64()),
        ("tokens", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)
LENGTHS = pa.field("lengths", pa.list_(pa.uint32()))
"""Of SFT data a last column: the columns in use of each row, so that the padding of a batch is known before a shard is
read. Lists of earlier versions, and of other data, are without."""
REMEDY = "delete it and run prepare again with the same output, or copy the folder again"
_INDEX_ROWS = 1 << 12  # shards in a row group of an index: what its writer holds


class ShardError(UserError):
    """A prepared folder or one of its files is missing or damaged; the message names it and the remedy."""


class FileEntry(TypedDict):
    """A file as a manifest lists it."""

    bytes: int
    sha256: str


def file_entry(data: bytes) -> FileEntry:
    """A file of this content."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a list. `name` is its place below the folder's root; `tokens` are those in segments: no padding."""

    split: str
    name: str
    rows: int
    segments: int
    tokens: int
    bytes: int
    sha256: str
    source: str = ""
    lengths: list[int] | None = None
    """Columns in use of each row; None: not listed."""

    def to_json(self) -> dict[str, Any]:
        """The fields; lengths only where they are listed."""
        entry = asdict(self)
        if self.lengths is None:
            del entry["lengths"]
        return entry


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """What a split holds, over all snapshots up to this one, and the lists of its shards."""

    documents: int | None = None
    """None: not counted."""
    rows: int = 0
    tokens: int = 0
    indexes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """What training needs to know of a prepared folder."""

    kind: Kind
    row_length: int
    packing: str = ""
    vocab_size: int = 0
    mask_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eot_token_id: int | None = None
    tokenizer_hash: str = ""
    root: str = "."
    """Where the shards' names begin, from the folder of the manifest on."""
    splits: Mapping[str, SplitEntry]
    sources: Mapping[str, Mapping[str, int]] | None = None
    """{source: {documents, rows, tokens}} of the train split; None: not counted."""
    epochs: Mapping[str, float] = field(default_factory=dict)
    """{source: its passes in one pass over a mixture}; empty: every row comes once."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, **entry: Any) -> DatasetEntry:
        """The entry of data that this tokenizer made: its size and special tokens, and what else `entry` says."""
        # Here, because who reads a folder does not need the seconds that importing transformers takes.
        from llada.tokenizer import END_OF_TURN, vocab_size

        return cls(
            vocab_size=vocab_size(tokenizer),
            mask_token_id=tokenizer.mask_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eot_token_id=tokenizer.get_vocab().get(END_OF_TURN),
            **entry,
        )

    def to_json(self) -> dict[str, Any]:
        """The entry as the manifest holds it; what was not counted is left out."""
        entry = asdict(self)
        if self.sources is None:
            del entry["sources"]
        for split in entry["splits"].values():
            split["indexes"] = list(split["indexes"])
            if split["documents"] is None:
                del split["documents"]
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> DatasetEntry:
        """The inverse of `to_json`; what an entry of another version does not say, or says beside it, is left out."""
        known = {f.name: entry[f.name] for f in fields(cls) if f.name in entry}
        known["splits"] = {
            name: SplitEntry(**{**split, "indexes": tuple(split["indexes"])})
            for name, split in entry["splits"].items()
        }
        return cls(**known)

    def split(self, name: str, url: str) -> SplitEntry:
        """Raises ShardError when the folder at `url`, whose entry this is, has no such split."""
        if name not in self.splits:
            raise ShardError(f"{url} has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]


def write_index(url: str, shards: Iterable[ShardEntry]) -> FileEntry:
    """Write the list of a split's shards, as they come; the file as a manifest lists it."""
    entries = iter(shards)
    page = list(islice(entries, _INDEX_ROWS))
    has_lengths = any(shard.lengths is not None for shard in page)
    schema = INDEX_SCHEMA.append(LENGTHS) if has_lengths else INDEX_SCHEMA
    with writing(url) as path:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            while page:
                rows = [{name: getattr(shard, name) for name in schema.names} for shard in page]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                page = list(islice(entries, _INDEX_ROWS))
        return {"bytes": os.path.getsize(path), "sha256": sha256(path)}


def read_index(url: str, split: str) -> pa.Table:
    """All shards of one split of a prepared folder (INDEX_SCHEMA, and LENGTHS where some have them)."""
    url = resolve_snapshot(url)
    indexes = load_dataset_entry(url).split(split, url).indexes
    try:
        tables = [pq.read_table(pa.BufferReader(read_bytes(join(url, name)))) for name in indexes]
    except FileNotFoundError as error:
        raise ShardError(f"missing list of shards: {error}; {REMEDY}") from None
    except pa.ArrowInvalid as error:
        raise ShardError(f"a list of shards in {url} is damaged ({error}); {REMEDY}") from None
    if not tables:
        return INDEX_SCHEMA.empty_table()
    return pa.concat_tables(
        tables, promote_options="default"
    ).combine_chunks()  # null where a list is without


def resolve_snapshot(url: str) -> str:
    """The newest snapshot of a prepared folder, so that a run keeps to it when the folder grows; `url` itself when it
    is one."""
    newest = _load_manifest(url).get("snapshot")
    return join(url, newest) if newest else url


def load_dataset_entry(url: str) -> DatasetEntry:
    """The "dataset" entry of a prepared folder's manifest."""
    manifest = _load_manifest(url)
    if "dataset" not in manifest:
        raise ShardError(f"{url} holds the output of stage {manifest.get('stage')!r}, not token shards")
    return DatasetEntry.from_json(manifest["dataset"])


def _load_manifest(url: str) -> dict[str, Any]:
    try:
        return json.loads(read_bytes(join(url, MANIFEST)))
    except FileNotFoundError:
        raise ShardError(
            f"no manifest.json in {url}: it is no prepared folder, or its preparation is not complete: "
            "run the stage 'prepare' to finish it"
        ) from None
    except StoreError:
        raise
    except ValueError:
        raise ShardError(f"{join(url, MANIFEST)} is not JSON; prepare the folder again") from None
