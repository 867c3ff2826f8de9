import re
import unicodedata
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from llada.data.document import Document
from llada.data.read import cleaning
from llada.data.read.cleaning import clean, clean_text


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


def test_documents_are_cleaned_and_cut_into_sections():
    text = "\n\n".join(f"{number} " + "x" * 50 for number in range(10)) + " \n"
    whole, short = Document(text, "a:1", url="http://a.org"), Document("b\r\n", "a:2")
    assert list(clean([whole, short])) == [replace(whole, text=text.rstrip()), replace(short, text="b")]
    *sections, last = clean([whole, short], section_chars=120)
    assert last == replace(short, text="b")
    assert len(sections) == 5
    assert all(len(section.text) <= 120 and section.url == whole.url for section in sections)
    assert "\n\n".join(section.text for section in sections) == text.rstrip()


def test_sections_without_empty_lines_end_at_a_line_or_anywhere():
    by_line = [d.text for d in clean([Document("y" * 80 + "\n" + "z" * 80)], 100)]
    assert by_line == ["y" * 80, "z" * 80]
    assert [d.text for d in clean([Document("y" * 250)], 100)] == ["y" * 100, "y" * 100, "y" * 50]
