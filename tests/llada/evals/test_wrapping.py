"""Documents in blocks: MDLM's rule by hand, and that no token of text is lost or moved."""

from __future__ import annotations

import pytest

from llada.errors import UserError
from llada.evals.wrapping import wrap_documents

TEXTS, IDS = ["ab", "", "cdé"], [[1, 2], [], [3, 4, 5]]
BOS, EOS = 8, 9


def test_blocks_with_ends_hold_two_tokens_of_text_less() -> None:
    wrapped = wrap_documents(TEXTS, IDS, 5, eos_id=EOS, ends=(BOS, EOS))
    # [1, 2, EOS, EOS, 3, 4, 5, EOS]: an empty document is its EOS.
    assert wrapped.blocks == [[BOS, 1, 2, EOS, EOS], [BOS, EOS, 3, 4, EOS]]
    assert (wrapped.text_tokens, wrapped.tokens_left_out) == (6, 2)
    assert wrapped.characters == 2 + 3 * 2 / 3
    assert wrapped.num_bytes == 2 + 4 * 2 / 3


def test_without_anything_between_the_text_is_cut_as_it_is() -> None:
    wrapped = wrap_documents(TEXTS, IDS, 2)
    assert wrapped.blocks == [[1, 2], [3, 4]]
    assert wrapped.tokens_left_out == 1
    kept = wrap_documents(TEXTS, IDS, 2, keeps_rest=True)
    assert kept.blocks == [[1, 2], [3, 4], [5]]
    assert (kept.text_tokens, kept.tokens_left_out, kept.characters, kept.num_bytes) == (5, 0, 5, 6)
    with_ends = wrap_documents(TEXTS, IDS, 6, ends=(BOS, EOS), keeps_rest=True)
    assert with_ends.blocks == [[BOS, 1, 2, 3, 4, EOS], [BOS, 5, EOS]]


def test_what_fills_no_block_is_named() -> None:
    with pytest.raises(UserError, match="5 tokens of text do not fill a block of 6: a smaller block length"):
        wrap_documents(TEXTS, IDS, 6)
    with pytest.raises(UserError, match="there is no text"):
        wrap_documents(["", ""], [[], []], 2, eos_id=EOS, keeps_rest=True)
    with pytest.raises(UserError, match="a block of 2 tokens has no room for text between its ends"):
        wrap_documents(TEXTS, IDS, 2, ends=(BOS, EOS))
