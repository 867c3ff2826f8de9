import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from llada.data import cleaning
from llada.data.cleaning import clean_text, length_reason


def test_clean_text():
    assert clean_text("\ufeffe\u0301a\u00a0b\x07 \t\r\nx\u2028\n\n\n\n\n  y\n") == "éa b\nx\n\n\n  y"


@given(st.text())
def test_cleaning_twice_changes_nothing(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert "\x00" not in once


@given(st.text(st.sampled_from("ae\u0301 \t\n\r\u2028\u00a0\u200b\x07\u00ad\ufeff")))
def test_cleaning_is_every_step_in_turn(text):
    """The short cuts of clean_text skip only what would change nothing."""
    text_ = cleaning._INVISIBLE.sub("", cleaning._LINE_BREAKS.sub("\n", text))
    text_ = cleaning._ODD_SPACES.sub(" ", unicodedata.normalize("NFC", text_))
    text_ = cleaning._MANY_NEWLINES.sub("\n\n\n", cleaning._TRAILING_SPACES.sub("", text_))
    assert clean_text(text) == text_.strip("\n")


def test_length_reason():
    assert length_reason("ab", 1, None) is None
    assert length_reason("", 1, None) == "too_short"
    assert length_reason("abc", 1, 2) == "too_long"
