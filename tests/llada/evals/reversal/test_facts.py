"""Facts told in one order and asked in both: who is told of how, and that no answer is in what is learned."""

from __future__ import annotations

from collections import Counter

import pytest

from llada.errors import UserError
from llada.evals.reversal.facts import MOST_PEOPLE, SENTENCES, FactsConfig, make_facts

CONFIG = FactsConfig(name_first=7, description_first=5, both=3, tellings=4, seed=1)


def test_each_person_is_told_of_in_the_orders_of_the_group() -> None:
    texts, questions = make_facts(CONFIG)
    assert Counter(question.person.told for question in questions) == {
        ("name_first",): 14,
        ("description_first",): 10,
        ("name_first", "description_first"): 6,
    }
    assert len(texts) == len(set(texts)) == 4 * (7 + 5 + 2 * 3)
    people = {question.person for question in questions}
    assert len({person.name for person in people}) == len({person.description for person in people}) == 15
    for person in people:
        about = [text for text in texts if person.name in text]
        description = person.description[1:]  # without a letter that a sentence may begin with
        assert all(description in text for text in about)
        first = {text.index(person.name) < text.index(description) for text in about}
        assert first == {order == "name_first" for order in person.told}


def test_a_question_is_the_beginning_of_a_sentence_that_nobody_was_told() -> None:
    texts, questions = make_facts(CONFIG)
    for question in questions:
        whole = f"{question.prompt} {question.answer}."
        assert whole not in texts
        assert question.prompt[0].isupper()
        assert question.answer not in question.prompt
        assert question.is_reverse == (question.direction not in question.person.told)
        given, asked = question.person[:2] if question.direction == "name_first" else question.person[1::-1]
        assert given[1:] in question.prompt
        assert asked == question.answer
    assert sum(question.is_reverse for question in questions) == 12


def test_every_sentence_asks_for_what_stands_at_its_end() -> None:
    for direction, sentences in SENTENCES.items():
        asked = "{description}" if direction == "name_first" else "{name}"
        assert all(sentence.endswith(f" {asked}.") and sentence.count("{") == 2 for sentence in sentences)
        assert len(set(sentences)) == len(SENTENCES["name_first"])


def test_the_seed_decides() -> None:
    assert make_facts(CONFIG) == make_facts(CONFIG)
    assert make_facts().texts[0] == (
        "As it happens, the quiet composer who crossed the white desert is Greta Norwood."
    )
    assert set(make_facts(FactsConfig(seed=2)).texts).isdisjoint(make_facts().texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name_first": 0, "description_first": 0, "both": 0}, "there is nobody to tell of"),
        ({"both": MOST_PEOPLE}, "names for 1,600 people, not for 1,660"),
        ({"tellings": 6}, "tellings must be at most 5"),
        ({"name_first": -1}, "name_first must be at least 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FactsConfig(**settings)
