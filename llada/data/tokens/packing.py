"""Token lists become rows of one fixed length. Pure functions on NumPy arrays.

    concatenate_and_cut  documents end to end, cut every L tokens (LLaDA's way): no padding, documents are cut anywhere
    best_fit             only documents longer than a row are cut; about 1 % padding or less (arXiv 2404.10830)
    one_per_row          one example a row (SFT)
A `RowLayout` says which of them makes a folder's rows.

L row length, R rows, S segments. A segment is a stretch of one row that belongs to one document:
    segments[s] = (start, answer_start, end) in columns, and row r owns segments[segment_offsets[r]:segment_offsets[r+1]].
Columns in no segment are padding. In pretraining answer_start equals start; in SFT it is where the answer begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Packing = Literal["concatenate_and_cut", "best_fit"]
Kind = Literal["pretrain", "sft", "unified"]


@dataclass(frozen=True)
class PackedRows:
    """Rows ready to be stored: tokens uint32 (R, L), segments uint32 (S, 3), segment_offsets uint64 (R + 1,)."""

    tokens: np.ndarray
    segments: np.ndarray
    segment_offsets: np.ndarray


@dataclass(frozen=True)
class RowLayout:
    """How the rows of a folder are made: of documents or whole dialogues (1-D arrays of tokens), or for kind "sft" of
    examples (`llada.data.tokens.chat.Example`)."""

    row_length: int
    pad_id: int
    packing: Packing = "concatenate_and_cut"
    kind: Kind = "pretrain"

    def size(self, item: Any) -> int:
        """What an item takes of a `capacity`."""
        return 1 if self.kind == "sft" else len(item)

    def capacity(self, rows: int) -> int:
        """What fills `rows` rows: tokens, or of "sft" examples."""
        return rows if self.kind == "sft" else rows * self.row_length

    def take(self, items: list[Any], capacity: int) -> tuple[list[Any], list[Any]]:
        """(the items of the next rows, those left), of items that fill `capacity`."""
        if self.kind != "sft" and self.packing == "concatenate_and_cut":
            return take_tokens(items, capacity)
        return items, []

    def rows(self, items: Sequence[Any]) -> PackedRows:
        """The items as rows; the last one may be padded."""
        if self.kind == "sft":
            examples = [(example.tokens, example.answer_start) for example in items]
            return one_per_row(examples, self.row_length, self.pad_id)
        pack = best_fit if self.packing == "best_fit" else concatenate_and_cut
        return pack(items, self.row_length, self.pad_id)


def take_tokens(documents: Sequence[np.ndarray], count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split a list of documents (1-D arrays) after exactly `count` tokens; the document on the border is cut in two."""
    head: list[np.ndarray] = []
    for position, document in enumerate(documents):
        if count < len(document):
            border = [document[:count]] if count else []
            return head + border, [document[count:], *documents[position + 1 :]]
        head.append(document)
        count -= len(document)
    return head, []


def concatenate_and_cut(documents: Sequence[np.ndarray], row_length: int, pad_id: int) -> PackedRows:
    """Lay documents end to end and cut every `row_length` tokens; only the last row may be padded, with `pad_id`.

    A document that crosses a cut becomes one segment in each row. No token is added, lost or moved.
    """
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    total = int(lengths.sum())
    rows = -(-total // row_length)
    tokens = np.full(rows * row_length, pad_id, dtype=np.uint32)
    if total:
        tokens[:total] = np.concatenate(documents)
    # Borders between segments: the end of every document and of every row.
    ends = np.union1d(np.cumsum(lengths), np.arange(row_length, total + 1, row_length))
    ends = ends[ends > 0]
    starts = np.concatenate([np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1]])
    row_of = starts // row_length
    first, last = starts - row_of * row_length, ends - row_of * row_length
    offsets = np.searchsorted(row_of, np.arange(rows + 1))
    return PackedRows(
        tokens.reshape(rows, row_length),
        np.stack([first, first, last], axis=1).astype(np.uint32),
        offsets.astype(np.uint64),
    )


def best_fit(documents: Sequence[np.ndarray], row_length: int, pad_id: int) -> PackedRows:
    """Pack documents (1-D arrays) whole, each a segment: best-fit decreasing (arXiv 2404.10830).

    A document longer than a row gives full rows and a rest. The pieces are placed longest first, each into the row with
    the least space left that holds it (of such rows, the one filled last). Rows stand in the order they were opened,
    so full ones first. Rows are padded at their end with `pad_id`. The more short documents, the less padding:
    pack many thousands together.
    """
    pieces = [
        document[start : start + row_length]
        for document in documents
        for start in range(0, len(document), row_length)
    ]
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    row_of = _assign_best_fit(lengths[longest_first], row_length)
    by_row = np.argsort(row_of, kind="stable")
    placed, row_of = longest_first[by_row], row_of[by_row]
    rows = int(row_of[-1]) + 1 if len(row_of) else 0
    offsets = np.searchsorted(row_of, np.arange(rows + 1))
    ends = np.cumsum(lengths[placed])
    starts = ends - lengths[placed]
    row_starts = starts[offsets[:-1]]  # counted in tokens before the row
    first, last = starts - row_starts[row_of], ends - row_starts[row_of]
    tokens = np.full((rows, row_length), pad_id, dtype=np.uint32)
    if rows:
        used = last[offsets[1:] - 1]
        tokens[np.arange(row_length) < used[:, None]] = np.concatenate([pieces[piece] for piece in placed])
    return PackedRows(
        tokens, np.stack([first, first, last], axis=1).astype(np.uint32), offsets.astype(np.uint64)
    )


def _assign_best_fit(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """The row int64 (n,) of each piece, in the order given; constant time per piece but for operations on L bits."""
    rows_with: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by the space that they have left
    # Bit s is set when rows_with[s] is not empty: the next space that fits is the lowest bit from n on.
    spaces = 0
    row_of = np.empty(len(lengths), dtype=np.int64)
    opened = 0
    for piece, length in enumerate(lengths.tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces ^= 1 << space
        else:
            row, space, opened = opened, row_length, opened + 1
        row_of[piece] = row
        if left := space - length:
            rows_with[left].append(row)
            spaces |= 1 << left
    return row_of


def one_per_row(examples: Sequence[tuple[Sequence[int], int]], row_length: int, pad_id: int) -> PackedRows:
    """Rows of (tokens, answer start) examples, one each, padded with `pad_id`. Raises ValueError if one is too long."""
    tokens = np.full((len(examples), row_length), pad_id, dtype=np.uint32)
    segments = np.zeros((len(examples), 3), dtype=np.uint32)
    for row, (ids, answer_start) in enumerate(examples):
        if len(ids) > row_length:
            raise ValueError(f"an example of {len(ids)} tokens does not fit a row of {row_length}")
        tokens[row, : len(ids)] = ids
        segments[row] = (0, answer_start, len(ids))
    return PackedRows(tokens, segments, np.arange(len(examples) + 1, dtype=np.uint64))


def answer_tokens(rows: PackedRows) -> np.ndarray:
    """The stored tokens a model is trained on, 1-D: columns [answer_start, end) of every segment, without padding."""
    count, length = rows.tokens.shape
    row_of = np.repeat(np.arange(count), np.diff(rows.segment_offsets).astype(np.int64))
    borders = np.zeros(count * length + 1, dtype=np.int64)
    np.add.at(borders, row_of * length + rows.segments[:, 1], 1)
    np.add.at(borders, row_of * length + rows.segments[:, 2], -1)
    return rows.tokens.reshape(-1)[np.cumsum(borders[:-1]) > 0]
