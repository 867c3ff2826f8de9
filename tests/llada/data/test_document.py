"""llada/data/document.py"""

import dataclasses

import pytest

from llada.data.document import UNKNOWN, Document, dialogue, prompt_answer_pairs, text_problem

DIALOGUE = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": " 4 "},
]


def test_an_n_turn_dialogue_gives_n_pairs():
    assert prompt_answer_pairs(DIALOGUE) == [(DIALOGUE[:2], DIALOGUE[2]), (DIALOGUE[:4], DIALOGUE[4])]


def test_an_answer_that_is_not_to_be_learned_stays_in_the_history():
    marked = [*DIALOGUE[:2], {**DIALOGUE[2], "trained": False}, *DIALOGUE[3:]]
    assert prompt_answer_pairs(marked) == [(DIALOGUE[:4], DIALOGUE[4])]


def test_pairs_need_a_question_before_the_answer():
    assert prompt_answer_pairs(DIALOGUE[:2]) == []
    assert prompt_answer_pairs([DIALOGUE[2]]) == []


def test_a_document_does_not_change():
    document = Document("abc", "a:1")
    assert (document.size, document.language, document.url, document.messages) == (3, UNKNOWN, None, ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        document.text = "x"


def test_a_dialogue_is_a_document():
    document = dialogue(DIALOGUE[1:3], [{"name": "look"}], "a:1")
    assert (document.tools, document.place) == (({"name": "look"},), "a:1")
    assert document.text == "user: Hi\nassistant: Hello"
    assert document.messages == tuple(DIALOGUE[1:3])
    assert document.size == len("HiHello")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("a", None),
        (None, "null_text"),
        (5, "text_not_a_string"),
        (" \n", "empty_text"),
        ("a\x00b", None),
        ("a\x00b\x00", "nul_character"),
        ("a\x00" + "b" * 200, None),
        ("a\x00\x00\x00" + "b" * 200, "nul_character"),
        ("a \ufffd \ufffd b", None),
        ("a \ufffd\ufffd\ufffd b" + "c" * 250, "undecodable_text"),
        ("a \ufffd\ufffd\ufffd b" + "c" * 350, None),
        ("a\x01\x02\x03" + "b" * 100, "control_characters"),
        ("a\x01\x02\x03" + "b" * 200, None),
        ("\x1b[1mbold\x1b[0m\tand\r\n\f" * 3, None),
        ("a\ud800", "not_utf8"),
    ],
)
def test_text_problem(value, problem):
    assert text_problem(value) == problem
