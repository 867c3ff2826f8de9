"""Documents in blocks: MDLM's rule by hand, and that no token of text is lost or moved."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from llada.errors import UserError
from llada.evals.perplexity.wrapping import Wrapped, Wrapping

TEXTS, IDS = ["ab", "", "cdé"], [[1, 2], [], [3, 4, 5]]
BOS, EOS = 8, 9


def wrap(
    texts: list[str], ids: list[list[int]], length: int, **settings: Any
) -> tuple[list[list[int]], Wrapped]:
    wrapping = Wrapping(length, **settings)
    blocks = [block for text, tokens in zip(texts, ids, strict=True) for block in wrapping.add(text, tokens)]
    last, wrapped = wrapping.finish()
    return blocks + last, wrapped


def test_blocks_with_ends_hold_two_tokens_of_text_less() -> None:
    blocks, wrapped = wrap(TEXTS, IDS, 5, eos_id=EOS, ends=(BOS, EOS))
    # [1, 2, EOS, EOS, 3, 4, 5, EOS]: an empty document is its EOS.
    assert blocks == [[BOS, 1, 2, EOS, EOS], [BOS, EOS, 3, 4, EOS]]
    assert (wrapped.blocks, wrapped.block_tokens, wrapped.tokens_left_out) == (2, 10, 2)
    assert wrapped.characters == 2 + 3 * 2 / 3
    assert wrapped.num_bytes == 2 + 4 * 2 / 3


def test_without_anything_between_the_text_is_cut_as_it_is() -> None:
    blocks, wrapped = wrap(TEXTS, IDS, 2)
    assert blocks == [[1, 2], [3, 4]]
    assert wrapped.tokens_left_out == 1
    blocks, wrapped = wrap(TEXTS, IDS, 2, keeps_rest=True)
    assert blocks == [[1, 2], [3, 4], [5]]
    assert wrapped == Wrapped(3, 5, 0, 5, 6)
    blocks, _ = wrap(TEXTS, IDS, 6, ends=(BOS, EOS), keeps_rest=True)
    assert blocks == [[BOS, 1, 2, 3, 4, EOS], [BOS, 5, EOS]]


def test_of_a_text_that_ends_with_a_block_what_is_before_it_is_counted() -> None:
    blocks, wrapped = wrap([*TEXTS, "", "xyz"], [*IDS, [], [6, 7]], 2, max_blocks=2, keeps_rest=True)
    assert blocks == [[1, 2], [3, 4]]
    assert wrapped == Wrapped(2, 4, 0, 2 + 3 * 2 / 3, 2 + 4 * 2 / 3)
    assert wrap(TEXTS, IDS, 2, max_blocks=9, keeps_rest=True) == wrap(TEXTS, IDS, 2, keeps_rest=True)


@pytest.mark.parametrize("keeps_rest", [False, True])
def test_what_the_blocks_hold_is_counted_as_if_all_were_there_at_once(keeps_rest: bool) -> None:
    draw = random.Random(0)
    for length in (1, 3, 7, 50):
        ids = [[draw.randrange(5) for _ in range(draw.choice((0, 1, 2, 9, 30)))] for _ in range(40)]
        texts = ["é" * (2 * len(tokens)) for tokens in ids]
        blocks, wrapped = wrap(texts, ids, length, eos_id=EOS, keeps_rest=keeps_rest)
        whole = list(itertools.chain.from_iterable([*tokens, EOS] for tokens in ids))
        kept = len(whole) if keeps_rest else len(whole) // length * length
        assert list(itertools.chain.from_iterable(blocks)) == whole[:kept]
        assert (wrapped.block_tokens, wrapped.tokens_left_out) == (kept, len(whole) - kept)
        assert wrapped.blocks == len(blocks)
        assert all(len(block) == length for block in blocks[:-1])
        text_tokens = kept - whole[:kept].count(EOS)
        assert wrapped.characters == pytest.approx(2 * text_tokens)
        assert wrapped.num_bytes == pytest.approx(4 * text_tokens)


def test_no_more_is_held_than_a_block_and_the_documents_that_it_cuts() -> None:
    wrapping = Wrapping(16)
    for _ in range(1000):
        blocks = list(wrapping.add("abc", [1, 2, 3]))
        assert len(blocks) <= 1
        assert len(wrapping._rest) < 16
        assert len(wrapping._cut) <= 6


def test_what_fills_no_block_is_named() -> None:
    with pytest.raises(UserError, match="5 tokens of text do not fill a block of 6: a smaller block length"):
        wrap(TEXTS, IDS, 6)
    with pytest.raises(UserError, match="there is no text"):
        wrap(["", ""], [[], []], 2, eos_id=EOS, keeps_rest=True)
    with pytest.raises(UserError, match="there is no text"):
        wrap([], [], 2)
    with pytest.raises(UserError, match="a block of 2 tokens has no room for text between its ends"):
        wrap(TEXTS, IDS, 2, ends=(BOS, EOS))
