"""The text of `objectives.py` as rows that ask every objective for the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from llada.data.tokens.manifest import write_index
from llada.data.tokens.packing import PackedRows
from llada.data.tokens.shards import write_shard, write_unigram_counts

EOS, MASK, FIRST_BYTE = 0, 1, 2


def number_bytes(stories: bytes) -> np.ndarray:
    """Ids (N,) of the bytes, in the order of those that occur, from FIRST_BYTE on; between two stories EOS."""
    text = stories.replace(b"<|endoftext|>", b"\0").strip(b"\0")
    values, ids = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    ids = ids + FIRST_BYTE - (values[0] == 0)
    return np.where(ids < FIRST_BYTE, EOS, ids)


def write_rows(stories: bytes, folder: Path, row_length: int, held_out_rows: int) -> int:
    """A prepared folder of rows (EOS, row_length − 1 ids), the last ones held out; EOS is in front as a prompt is: seen and
    never asked for. The number of ids."""
    ids = number_bytes(stories)
    asked = row_length - 1
    rows = np.full((len(ids) // asked, row_length), EOS, np.uint32)
    rows[:, 1:] = ids[: len(rows) * asked].reshape(len(rows), asked)
    vocab_size = int(ids.max()) + 1
    splits = {}
    for split, tokens in (("train", rows[:-held_out_rows]), ("validation", rows[-held_out_rows:])):
        n = len(tokens)
        segments = np.tile(np.array([0, 1, row_length], np.uint32), (n, 1))
        packed = PackedRows(tokens, segments, np.arange(n + 1, dtype=np.uint64))
        entry = write_shard(str(folder), split, "0", packed)
        write_index(f"{folder}/{split}.parquet", [entry])
        splits[split] = {"rows": entry.rows, "tokens": entry.tokens, "indexes": [f"{split}.parquet"]}
    counts = np.bincount(rows[:-held_out_rows, 1:].ravel(), minlength=vocab_size)
    write_unigram_counts(str(folder), counts.astype(np.int64))
    dataset = {
        "kind": "pretrain",
        "row_length": row_length,
        "vocab_size": vocab_size,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "splits": splits,
    }
    (folder / "manifest.json").write_text(json.dumps({"dataset": dataset}))
    return vocab_size
