"""The option that a text decides for: OpenCompass' rules, in their order."""

from __future__ import annotations

import pytest

from llada.evals.benchmarks.letters import chosen_letter, letter_score


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("\nB", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B. yes", "B"),
        ("B: x", "B"),
        ("Answer: A. Because", "A"),
        ("An apple is D", "D"),
        ("I think the answer is C.", "C"),
        ("A plant needs light, so the correct answer is D.", "D"),
        ("The answer is option B, not A or C: they fail.", "B"),
        ("A or B? The answer is B because A is not.", "B"),
        ("Of these, B holds. So it must be C", "C"),  # what ends the text goes first
        ("Options differ.", ""),  # O is not asked for
        ("none of them", ""),
        ("", ""),
    ],
)
def test_the_letter_is_that_of_the_first_rule_that_finds_one(text: str, letter: str) -> None:
    assert chosen_letter(text, "ABCD") == letter


def test_letters_that_are_no_options_are_passed_over() -> None:
    assert chosen_letter("E is what I say, or C", "ABCDE") == "C"
    assert chosen_letter("E, I say", "ABCD") == ""
    assert chosen_letter("E, I say", "ABCDE") == "E"


def test_a_document_is_judged_by_its_own_letters() -> None:
    doc = {"right": "B"}
    judged = [letter_score(lambda doc: ("AB", doc["right"]), doc, [text]) for text in ("B", "A", "C, or so")]
    assert judged == [{"exact_match": 1.0}, {"exact_match": 0.0}, {"exact_match": 0.0}]
