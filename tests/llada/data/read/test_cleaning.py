import re
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from llada.data.read import cleaning
from llada.data.read.cleaning import clean_text, length_reason


def test_clean_text():
    assert clean_text("\ufeffe\u0301a\u00a0b\x07 \t\r\nx\u2028\n\n\n\n\n  y\n") == "éa b\nx\n\n\n  y"


@given(st.text())
def test_cleaning_twice_changes_nothing(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert "\x00" not in once


ASCII, OTHERS = "ae \t\n\r\x07\x7f", "\u0301\u2028\u00a0\u200b\u00ad\ufeff"


@given(st.text(st.sampled_from(ASCII)) | st.text(st.sampled_from(ASCII + OTHERS)))
def test_cleaning_is_every_step_in_turn(text):
    """The short cuts of clean_text skip only what would change nothing."""
    text_ = cleaning._INVISIBLE.sub("", re.sub("\r\n?|[\u0085\u2028\u2029]", "\n", text))
    text_ = cleaning._ODD_SPACES.sub(" ", unicodedata.normalize("NFC", text_))
    text_ = cleaning._MANY_NEWLINES.sub("\n\n\n", re.sub(r"(?m)[ \t]+$", "", text_))
    assert clean_text(text) == text_.strip("\n")


def test_length_reason():
    assert length_reason("ab", 1, None) is None
    assert length_reason("", 1, None) == "too_short"
    assert length_reason("abc", 1, 2) == "too_long"
