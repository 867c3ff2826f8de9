from hypothesis import given
from hypothesis import strategies as st

from llada.data.cleaning import clean_text, length_reason


def test_clean_text():
    assert clean_text("\ufeffe\u0301a\u00a0b\x07 \t\r\nx\u2028\n\n\n\n\n  y\n") == "éa b\nx\n\n\n  y"


@given(st.text())
def test_cleaning_twice_changes_nothing(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert "\x00" not in once


def test_length_reason():
    assert length_reason("ab", 1, None) is None
    assert length_reason("", 1, None) == "too_short"
    assert length_reason("abc", 1, 2) == "too_long"
