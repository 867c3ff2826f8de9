import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llada.data.tokens.packing import answer_tokens, best_fit, concatenate_and_cut, one_per_row, take_tokens

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


# --- Best fit ---------------------------------------------------------------------------------------------------------

PAD = 0  # no document of the strategy holds it


def segments_of(rows, row):
    first, end = int(rows.segment_offsets[row]), int(rows.segment_offsets[row + 1])
    return rows.segments[first:end].tolist()


def packed_pieces(rows):
    """The tokens of each segment, row by row."""
    return [
        tuple(rows.tokens[row, start:end])
        for row in range(len(rows.tokens))
        for start, _, end in segments_of(rows, row)
    ]


def rows_by_definition(lengths, row_length):
    """Best-fit decreasing, straight from its definition: the pieces' lengths in each row."""
    rows = []  # the one filled last stands first
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= row_length]
        best = max(fitting, key=sum, default=[])
        rows = [[*best, length], *(row for row in rows if row is not best)]
    return rows


@given(documents_strategy, st.integers(1, 16))
def test_best_fit_keeps_every_document_in_segments_of_its_own(documents, row_length):
    rows = best_fit(documents, row_length, PAD)
    pieces = [tuple(d[i : i + row_length]) for d in documents for i in range(0, len(d), row_length)]
    assert sorted(packed_pieces(rows)) == sorted(pieces)  # none lost, doubled, changed, cut or joined
    for row in range(len(rows.tokens)):
        column = 0
        for start, answer_start, end in segments_of(rows, row):
            assert start == answer_start == column < end <= row_length
            column = end
        assert column > 0
        assert (rows.tokens[row, column:] == PAD).all()
    assert rows.segment_offsets[-1] == len(rows.segments)


@given(documents_strategy, st.integers(1, 16))
def test_best_fit_fills_rows_as_best_fit_decreasing_does(documents, row_length):
    rows = best_fit(documents, row_length, PAD)
    lengths = [len(d[i : i + row_length]) for d in documents for i in range(0, len(d), row_length)]
    found = [[end - start for start, _, end in segments_of(rows, row)] for row in range(len(rows.tokens))]
    assert sorted(found) == sorted(rows_by_definition(lengths, row_length))


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=10), min_size=1, max_size=8))
def test_best_fit_stays_within_its_bound(rows_of_lengths):
    """Pieces cut from k full rows fit k rows; best-fit decreasing needs at most 3/2 k (Simchi-Levi 1994)."""
    row_length = 12
    lengths = []
    for row in rows_of_lengths:
        space = row_length
        while space:
            lengths.append(min(space, row[len(lengths) % len(row)] * 2))
            space -= lengths[-1]
    optimum = len(rows_of_lengths)
    packed = best_fit([np.ones(length, dtype=np.uint32) for length in lengths], row_length, PAD)
    assert optimum <= len(packed.tokens) <= 1.5 * optimum


def test_best_fit_order():
    a, b, c, d = (np.full(n, i + 1, dtype=np.uint32) for i, n in enumerate((3, 11, 2, 5)))
    rows = best_fit([a, b, c, d, np.empty(0, dtype=np.uint32)], 8, PAD)
    # b gives a full row and three tokens; d opens a row, a (the first of length 3) fills it; b's rest and c share one
    assert rows.tokens.tolist() == [[2] * 8, [4] * 5 + [1] * 3, [2] * 3 + [3] * 2 + [PAD] * 3]
    assert rows.segments.tolist() == [[0, 0, 8], [0, 0, 5], [5, 5, 8], [0, 0, 3], [3, 3, 5]]
    assert rows.segment_offsets.tolist() == [0, 1, 3, 5]
    assert best_fit([], 8, PAD).tokens.shape == (0, 8)


@pytest.mark.parametrize("row_length", [1024, 4096])
def test_best_fit_wastes_little_on_real_documents(shared_dir, row_length, record_property):
    data = shared_dir / "data"
    tokenizer = Tokenizer.from_file(str(data / "tokenizers/gpt-neox-olmo-dolma-v1_5/tokenizer.json"))
    texts = (data / "text/tinystories.txt").read_text().split("<|endoftext|>")
    texts += [json.loads(line)["text"] for line in (data / "text/wiki_demo.jsonl").open()]
    texts += [json.loads(line)["text"] for line in (data / "web/quality_labels.jsonl").open()]
    documents = [np.array(e.ids, dtype=np.uint32) for e in tokenizer.encode_batch_fast(texts)]
    rows = best_fit(documents, row_length, PAD)
    used = sum(map(len, documents))
    waste = 1 - used / rows.tokens.size
    record_property("waste", float(waste))
    print(
        f"{len(documents)} documents, {used} tokens, {len(rows.tokens)} rows of {row_length}: {waste:.2%} padding"
    )
    assert len(answer_tokens(rows)) == used
    assert waste < 0.01
