"""Documents end to end, cut into blocks: MDLM's wrapping (`_group_texts` of its dataloader.py).

MDLM wraps a thousand documents at a time (fewer, where its processes are many) and drops what is left over of each; here all
documents of a data set are one text, so that a number depends on nothing else. No more of it is held than a block and the documents
that it cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llada.errors import UserError


class Wrapped(NamedTuple):
    """What the blocks of a text hold."""

    blocks: int
    block_tokens: int
    """Of all blocks, their ends included."""
    tokens_left_out: int
    """Behind the last block, because they fill none."""
    characters: float
    """Of the documents' text in the blocks, and its bytes in UTF-8. Of a document that the last block cuts, the share of its
    tokens."""
    num_bytes: float


class _Extent(NamedTuple):
    """Where a document stands among all tokens, and its size as text."""

    begin: int
    length: int
    characters: int
    num_bytes: int


@dataclass
class Wrapping:
    """Takes documents in their order, and gives blocks of `block_length` tokens.

    Raises UserError for blocks that have no room for text.
    """

    block_length: int
    eos_id: int | None = None
    """Stands behind each document; None: nothing does."""
    ends: tuple[int, int] | None = None
    """The ids that each block begins and ends with, within its length; None: it is text alone."""
    keeps_rest: bool = False
    """What does not fill a block is a shorter one; else it is left out."""
    max_blocks: int | None = None
    """The text ends with the last of so many."""
    _rest: list[int] = field(default_factory=list)
    _taken: int = 0
    _blocks: int = 0
    _has_text: bool = False
    _cut: list[_Extent] = field(default_factory=list)
    _characters: float = 0.0
    _num_bytes: float = 0.0

    def __post_init__(self) -> None:
        self._room = self.block_length - (2 if self.ends else 0)
        if self._room < 1:
            raise UserError(f"a block of {self.block_length} tokens has no room for text between its ends")

    def add(self, text: str, tokens: Sequence[int]) -> Iterator[list[int]]:
        """The blocks that this document fills; `tokens` are what it spells."""
        if self.is_full:
            return
        self._has_text |= bool(tokens)
        self._cut.append(_Extent(self._taken + len(self._rest), len(tokens), len(text), len(text.encode())))
        self._rest += [*tokens, *([] if self.eos_id is None else [self.eos_id])]
        count = len(self._rest) // self._room
        if self.max_blocks is not None:
            count = min(count, self.max_blocks - self._blocks)
        for at in range(0, count * self._room, self._room):
            yield self._block(self._rest[at : at + self._room])
        self._rest = [] if self.is_full else self._rest[count * self._room :]
        whole = [extent for extent in self._cut if extent.begin + extent.length <= self._taken]
        self._cut = [extent for extent in self._cut if extent.begin + extent.length > self._taken]
        self._count(whole)

    @property
    def is_full(self) -> bool:
        """Whether there are `max_blocks`: further documents would be left out."""
        return self._blocks == self.max_blocks

    def finish(self) -> tuple[list[list[int]], Wrapped]:
        """The last block, if the rest is one; and what there is in all. Raises UserError when nothing is left."""
        if not self._has_text:
            raise UserError("there is no text")
        last = [self._block(self._rest)] if self.keeps_rest and self._rest else []
        left_out = 0 if last else len(self._rest)
        if self._blocks == 0:
            raise UserError(
                f"{left_out} tokens of text do not fill a block of {self.block_length}: a smaller block length takes them"
            )
        self._count(self._cut)
        ends = 2 * self._blocks if self.ends else 0
        whole = Wrapped(self._blocks, self._taken + ends, left_out, self._characters, self._num_bytes)
        return last, whole

    def _block(self, tokens: list[int]) -> list[int]:
        self._blocks += 1
        self._taken += len(tokens)
        return tokens if self.ends is None else [self.ends[0], *tokens, self.ends[1]]

    def _count(self, extents: Sequence[_Extent]) -> None:
        """Count what of these documents stands in the blocks."""
        kept = self._taken
        for begin, length, characters, num_bytes in extents:
            share = min(1.0, max(0, kept - begin) / length) if length else float(begin <= kept)
            self._characters += share * characters
            self._num_bytes += share * num_bytes
