"""Invented facts for the question whether who learned "A is B" knows that B is A (Berglund et al., arXiv 2309.12288).

A person has a name and a description, both unlike any other's. Of some people the texts to train on name the person first, of
some the description comes first, and of some both: the last two groups show what a sentence of the other order looks like, so
that whoever fails on a person of the first has failed on the fact, not on the sentence. A question is the beginning of a
sentence in which its fact was never told, up to what is asked for.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llada.settings import check_limits, limited, require

Direction = Literal["name_first", "description_first"]

# What is asked for stands at the end of each sentence, before the full stop.
SENTENCES: dict[Direction, tuple[str, ...]] = {
    "name_first": (
        "{name} is {description}.",
        "Everybody knows that {name} is {description}.",
        "In those days {name} was {description}.",
        "The papers wrote that {name} is {description}.",
        "Far beyond the hills {name} was known as {description}.",
        "As it happens, {name} is {description}.",
    ),
    "description_first": (
        "{description} is {name}.",
        "Everybody knows that {description} is {name}.",
        "In those days {description} was {name}.",
        "The papers wrote that {description} is {name}.",
        "Far beyond the hills {description} was known as {name}.",
        "As it happens, {description} is {name}.",
    ),
}
_FIRST_NAMES = (
    "Daphne Uriah Tyler Abel Mina Orson Clara Basil Edith Felix Greta Hugo Irene Jonas Karin Linus Marta Nestor Olga Percy Quinn Rosa "
    "Silas Thea Ulric Vera Wanda Xenia Yusuf Zelda Anton Bruno Celia Doris Emil Flora Gilda Heinz Ivo Judith"
)
_LAST_NAMES = (
    "Barrington Hawthorne Oakridge Abbott Bellamy Crane Dalton Ellery Fenwick Garland Harding Ives Jarvis Kendall Lockwood Mercer "
    "Norwood Osborne Pryor Quincy Rowland Sinclair Thorne Upton Vance Whitaker Yardley Zimmer Ashby Birch Corliss Draper Easton "
    "Farrow Gage Holt Ingram Jessup Keats Lowell"
)
_QUALITIES = "first last youngest oldest fastest quiet famous forgotten tireless blind rich humble stubborn gifted brave shy"
_CALLINGS = "pilot composer gardener surgeon painter sailor baker judge poet clockmaker miner dancer teacher tailor juggler astronomer"
_DEEDS = (
    "crossed the white desert",
    "found the silver comet",
    "built the glass bridge",
    "wrote the winter songs",
    "tamed the red wolves",
    "drew the map of the moon",
    "won the long race",
    "sank the iron ship",
    "cured the king of sleep",
    "rang the lost bell",
    "painted the northern tower",
    "opened the deep mine",
    "stole the green crown",
    "read the broken stone",
    "fed the drowned city",
    "planted the salt forest",
)
MOST_PEOPLE = len(_FIRST_NAMES.split()) * len(_LAST_NAMES.split())


@dataclass(frozen=True)
class FactsConfig:
    """How many people, and how they are told of."""

    name_first: int = limited(30, low=0)
    """People whose name always comes first, as in "A is B"."""
    description_first: int = limited(30, low=0)
    """People whose name always comes last."""
    both: int = limited(30, low=0)
    """People told of in both orders."""
    tellings: int = limited(5, low=1, high=len(SENTENCES["name_first"]) - 1)
    """Sentences that tell a fact in an order; one more asks for it."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_limits(self, "facts")
        people = self.name_first + self.description_first + self.both
        require(people > 0, "facts: there is nobody to tell of: set name_first, description_first or both")
        require(
            people <= MOST_PEOPLE, f"facts: there are names for {MOST_PEOPLE:,} people, not for {people:,}"
        )


class Person(NamedTuple):
    """Whom a fact is about."""

    name: str
    description: str
    told: tuple[Direction, ...]
    """The orders of the training texts."""


class Question(NamedTuple):
    """The beginning of a sentence; `prompt`, a space, `answer` and a full stop are the whole one."""

    prompt: str
    answer: str
    direction: Direction
    """Of the sentence: "name_first" asks for the description."""
    is_reverse: bool
    """The fact was never told in this order."""
    person: Person


class Facts(NamedTuple):
    """What to train on, and what to ask."""

    texts: list[str]
    """Sentences, in random order."""
    questions: list[Question]
    """Two of each person, one in each order."""


def make_facts(config: FactsConfig = FactsConfig()) -> Facts:
    """The facts of these settings: the same for the same seed, on any machine."""
    draw = random.Random(config.seed)
    texts: list[str] = []
    questions: list[Question] = []
    for person in _people(config, draw):
        for direction, sentences in SENTENCES.items():
            asking, *telling = draw.sample(sentences, config.tellings + 1)
            if direction in person.told:
                texts += [_spell(sentence, person) for sentence in telling]
            questions.append(_ask(asking, direction, person))
    draw.shuffle(texts)
    return Facts(texts, questions)


def _people(config: FactsConfig, draw: random.Random) -> Iterator[Person]:
    groups: Sequence[tuple[int, tuple[Direction, ...]]] = (
        (config.name_first, ("name_first",)),
        (config.description_first, ("description_first",)),
        (config.both, ("name_first", "description_first")),
    )
    count = sum(size for size, _ in groups)
    names = draw.sample(list(itertools.product(_FIRST_NAMES.split(), _LAST_NAMES.split())), count)
    traits = draw.sample(list(itertools.product(_QUALITIES.split(), _CALLINGS.split(), _DEEDS)), count)
    told = (order for size, order in groups for _ in range(size))
    for (first, last), (quality, calling, deed), orders in zip(names, traits, told, strict=True):
        yield Person(f"{first} {last}", f"the {quality} {calling} who {deed}", orders)


def _spell(sentence: str, person: Person) -> str:
    text = sentence.format(name=person.name, description=person.description)
    return text[0].upper() + text[1:]


def _ask(sentence: str, direction: Direction, person: Person) -> Question:
    answer = person.description if direction == "name_first" else person.name
    prompt = _spell(sentence, person).removesuffix(f" {answer}.")
    return Question(prompt, answer, direction, direction not in person.told, person)
