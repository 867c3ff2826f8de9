import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada.data.packing import answer_tokens, concatenate_and_cut, one_per_row, take_tokens

documents_strategy = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=30), max_size=12).map(
    lambda lists: [np.array(tokens, dtype=np.uint32) for tokens in lists]
)


@given(documents_strategy, st.integers(1, 16))
def test_no_token_is_lost_added_or_moved(documents, row_length):
    rows = concatenate_and_cut(documents, row_length, pad_id=0)
    total = sum(map(len, documents))
    everything = np.concatenate(documents) if documents else np.empty(0)
    assert rows.tokens.shape == (-(-total // row_length), row_length)
    assert np.array_equal(rows.tokens.reshape(-1)[:total], everything)
    assert not rows.tokens.reshape(-1)[total:].any()
    assert np.array_equal(answer_tokens(rows), everything)


@given(documents_strategy, st.integers(1, 16))
def test_segments_are_the_documents(documents, row_length):
    rows = concatenate_and_cut(documents, row_length, pad_id=0)
    owner = (
        np.concatenate([np.full(len(d), i) for i, d in enumerate(documents)]) if documents else np.empty(0)
    )
    assert rows.segment_offsets[-1] == len(rows.segments)
    for row in range(len(rows.tokens)):
        column = 0
        for start, answer_start, end in rows.segments[
            rows.segment_offsets[row] : rows.segment_offsets[row + 1]
        ]:
            assert start == answer_start == column < end  # they follow one another without a gap
            owners = owner[row * row_length + start : row * row_length + end]
            assert (owners == owners[0]).all()
            if end < row_length and row * row_length + end < len(owner):
                assert owner[row * row_length + end] != owners[0]
            column = end
        assert column == min(row_length, len(owner) - row * row_length)


@given(documents_strategy, st.integers(0, 100))
def test_take_tokens_then_pack_equals_pack(documents, rows_first):
    row_length = 4
    count = rows_first * row_length
    head, rest = take_tokens(documents, count)
    assert sum(map(len, head)) == min(count, sum(map(len, documents)))
    whole = concatenate_and_cut(documents, row_length, 0)
    parts = [concatenate_and_cut(piece, row_length, 0) for piece in (head, rest)]
    assert np.array_equal(whole.tokens, np.concatenate([p.tokens for p in parts]))
    assert np.array_equal(whole.segments, np.concatenate([p.segments for p in parts]))


def test_one_per_row():
    rows = one_per_row([([5, 6, 7], 1), ([8, 9], 1)], 4, pad_id=0)
    assert rows.tokens.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert rows.segments.tolist() == [[0, 1, 3], [0, 1, 2]]
    assert answer_tokens(rows).tolist() == [6, 7, 9]
    with pytest.raises(ValueError, match="5 tokens does not fit a row of 4"):
        one_per_row([([1] * 5, 1)], 4, pad_id=0)
