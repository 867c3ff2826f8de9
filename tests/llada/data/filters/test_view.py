"""llada/data/filters/view.py"""

import pytest

from llada.data.document import UNKNOWN
from llada.data.filters.view import TextView
from llada.data.filters.words import LATIN, NO_LETTER, OTHER_SCRIPT, UNSEGMENTED


def test_lines_and_pieces():
    view = TextView("one two\u2028three\n\nfour")
    assert view.lines == ["one two", "three", "", "four"]
    assert view.line_pieces == [["one", "two"], ["three"], [], ["four"]]
    assert view.pieces == ["one", "two", "three", "four"]
    assert len(view.words) == 4


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("words", LATIN),
        ("слова и words", OTHER_SCRIPT),
        ("白日依山盡 and", UNSEGMENTED),
        ("１２３ …", NO_LETTER),
        ("", LATIN),
    ],
)
def test_script(text, script):
    assert TextView(text).script == script
    assert TextView(text).is_unsegmented is (script == UNSEGMENTED)


def test_a_view_of_a_text():
    view = TextView("One two.\n\n three\x0bfour")
    assert view.lines == ["One two.", "", " three", "four"]
    assert view.pieces == ["One", "two.", "three", "four"]
    assert len(view.words) == 5
    assert view.script == LATIN


@pytest.mark.parametrize(
    ("text", "language", "english"),
    [
        ("Plain words", UNKNOWN, True),
        ("123 456 ×", UNKNOWN, True),
        ("Привет мир, hello", UNKNOWN, False),
        ("Plain words", "fr", False),
        ("Plain words", "enm", False),
        ("Привет", "en", True),
        ("Plain", "eng_Latn", True),
        ("Plain", "en-GB", True),
    ],
)
def test_rules_for_english_apply_to_english(text, language, english):
    assert TextView(text).is_english(language) is english
