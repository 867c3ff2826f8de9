import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada.data.filters.words import (
    LATIN,
    NO_LETTER,
    OTHER_SCRIPT,
    PUNCTUATION,
    SENTENCE_END,
    UNSEGMENTED,
    encode_words,
    split_piece,
    split_words,
)

# Words as spaCy 3.8's English tokenizer gives them.
AS_SPACY = {
    "plain": "plain",
    "end.": "end .",
    '"Quoted,"': '" Quoted , "',
    "(well-known)": "( well - known )",
    "don't": "do n't",
    "Don’t": "Do n’t",
    "DON'T": "DON'T",
    "they'll've": "they 'll 've",
    "cannot": "can not",
    "its": "its",
    "it's": "it 's",
    "John's,": "John 's ,",
    "dogs'": "dogs '",
    "Mr.": "Mr.",
    "Mr.,": "Mr. ,",
    "U.S.": "U.S.",
    "USA.": "USA .",
    "I.": "I.",
    "x.": "x.",
    "10km": "10 km",
    "$5.99": "$ 5.99",
    "5€": "5 €",
    "9am": "9 am",
    "9am.": "9 am .",
    "425°F.": "425 ° F.",
    "wait...what": "wait ... what",
    "wait....": "wait ....",
    "Co.,Ltd": "Co. ,Ltd",
    "great:)": "great :)",
    "and/or": "and/or",
    "his/her": "his / her",
    "end.Start": "end . Start",
    "a,b": "a , b",
    "1,000": "1,000",
    "3-4": "3 - 4",
    "a--b": "a -- b",
    "http://example.com/a-b/c?d=e,f": "http://example.com/a-b/c?d=e,f",
    "(www.example.com).": "( www.example.com ) .",
    "me@example.com": "me@example.com",
    "-foo": "-foo",
    "===": "= = =",
    "#tag": "# tag",
    "C++": "C++",
    "I�m": "I � m",
    "Ελλάδα.": "Ελλάδα .",
}


@pytest.mark.parametrize("piece", AS_SPACY)
def test_pieces_come_apart_as_spacy_splits_them(piece):
    if piece == "425°F.":  # the one known difference: "F" and "." are apart there
        assert split_piece(piece) == ["425", "°", "F."]
    else:
        assert split_piece(piece) == AS_SPACY[piece].split()


def test_scripts_without_spaces_have_a_word_per_character():
    assert split_words("白日依山盡，黃河 GPT2入海流。") == [*"白日依山盡，黃河", "GPT2", *"入海流。"]
    assert split_words("น้ำใจ") == ["น้", "ำ", "ใ", "จ"]  # the tone mark stays with its letter
    assert split_words("བོད་ཡིག") == ["བོ", "ད་", "ཡི", "ག"]
    assert split_words("영화가 좋다.") == ["영화가", "좋다", "."]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_character_is_lost_or_made_up(text):
    assert "".join(split_words(text)) == "".join(text.split())


def test_a_word_as_numbers():
    words = encode_words(["it", "is.", "2024", "字", "Привет", "it"])
    assert words["chars"].tolist() == [2, 2, 1, 4, 1, 6, 2]
    assert words["script"].tolist() == [LATIN, LATIN, NO_LETTER, NO_LETTER, UNSEGMENTED, OTHER_SCRIPT, LATIN]
    assert words["is_symbol"].tolist() == [False, False, True, False, False, False, False]
    assert words["stop"].tolist() == [0, 0, SENTENCE_END, 0, 0, 0, 0]
    assert encode_words(['"'])["stop"].tolist() == [PUNCTUATION]
    assert words["key"][0] == words["key"][6]
    assert len(np.unique(words["key"])) == 6
    assert int(words["key"][0]) == 0xD284D8DEC496F507, "the same in every process and on every machine"


def test_pieces_remembered_and_forgotten_give_the_same(monkeypatch):
    from llada.data.filters import words

    pieces = [f"word{i % 50}," for i in range(200)]
    fresh = encode_words(pieces).tobytes()
    monkeypatch.setattr(words, "_REMEMBERED_PIECES", 7)
    words._PIECES.clear()
    assert encode_words(pieces).tobytes() == fresh == encode_words(pieces).tobytes()
    assert len(words._PIECES) <= 7


@pytest.mark.parametrize(
    "unit", ["a-", "a.", "!", "(", "a@", "x/", "1.", "=", "ab-!", "。", "...a", "US$", "''s"]
)
def test_junk_without_spaces_takes_linear_time(unit):
    start = time.thread_time()
    encode_words([unit * 250, unit * 30_000])
    assert time.thread_time() - start < 2
