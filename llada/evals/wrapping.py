"""Documents end to end, cut into blocks: MDLM's wrapping (`_group_texts` of its dataloader.py).

MDLM wraps a thousand documents at a time (fewer, where its processes are many) and drops what is left over of each; here all
documents of a data set are one text, so that a number depends on nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from llada.errors import UserError


class Wrapped(NamedTuple):
    """The blocks of a text."""

    blocks: list[list[int]]
    """Token ids, all of one length, but the last one where the rest is kept."""
    text_tokens: int
    """Of the documents (and the EOS between them), in the blocks."""
    tokens_left_out: int
    characters: float
    """Of the documents' text in the blocks, and its bytes in UTF-8. Of a document that the last block cuts, the share of its
    tokens."""
    num_bytes: float


def wrap_documents(
    texts: Sequence[str],
    documents: Sequence[Sequence[int]],
    block_length: int,
    *,
    eos_id: int | None = None,
    ends: tuple[int, int] | None = None,
    keeps_rest: bool = False,
) -> Wrapped:
    """Blocks of `block_length` tokens.

    Args:
        texts: what the documents' tokens spell.
        eos_id: stands behind each document; None: nothing does.
        ends: the ids that each block begins and ends with, within its length; None: it is text alone.
        keeps_rest: what does not fill a block is a shorter one; else it is left out.

    Raises UserError when nothing is left, or a block has no room for text.
    """
    room = block_length - (2 if ends else 0)
    if room < 1:
        raise UserError(f"a block of {block_length} tokens has no room for text between its ends")
    behind = [] if eos_id is None else [eos_id]
    tokens = list(itertools.chain.from_iterable([*document, *behind] for document in documents))
    kept = len(tokens) if keeps_rest else len(tokens) // room * room
    if not any(map(len, documents)):
        raise UserError("there is no text")
    if kept == 0:
        raise UserError(
            f"{len(tokens)} tokens of text do not fill a block of {block_length}: a smaller block length takes them"
        )
    begin, end = ([ends[0]], [ends[1]]) if ends else ([], [])
    blocks = [[*begin, *tokens[at : min(at + room, kept)], *end] for at in range(0, kept, room)]
    characters = num_bytes = 0.0
    before = 0
    for text, document in zip(texts, documents, strict=True):
        length = len(document)
        share = min(1.0, max(0, kept - before) / length) if length else float(before <= kept)
        characters += share * len(text)
        num_bytes += share * len(text.encode())
        before += length + len(behind)
    return Wrapped(blocks, kept, len(tokens) - kept, characters, num_bytes)
