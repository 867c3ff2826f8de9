"""The tasks of `instructions.py`: what is done with four words, told in a text's way or asked for as an instruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

_PAIRS = (
    "hot-cold big-small early-late high-low rich-poor old-new full-empty light-dark "
    "fast-slow hard-soft wet-dry loud-quiet near-far thick-thin sweet-sour clean-dirty"
)
PAIRS = [tuple(pair.split("-")) for pair in _PAIRS.split()]
OPPOSITES = {**dict(PAIRS), **{b: a for a, b in PAIRS}}
GIVEN = 4  # words


@dataclass(frozen=True)
class Task:
    answer: Callable[[Sequence[str], Random], Sequence[str]]
    told: str
    """By what word a text announces it."""
    verbs: tuple[str, str]
    """By what words it is asked for."""


def _any_order(words: Sequence[str], random: Random) -> Sequence[str]:
    return random.sample(words, len(words))


TASKS = {
    "repeat": Task(lambda words, _: words, "again", ("repeat", "copy")),
    "reverse": Task(lambda words, _: words[::-1], "backwards", ("reverse", "flip")),
    "capitals": Task(lambda words, _: [word.upper() for word in words], "aloud", ("shout", "capitalise")),
    "opposites": Task(lambda words, _: [OPPOSITES[word] for word in words], "instead", ("negate", "oppose")),
    "each twice": Task(lambda words, _: [word for word in words for _ in "12"], "doubled", ("double", "stutter")),
    "any order": Task(_any_order, "mixed", ("shuffle", "mix")),
    "first": Task(lambda words, _: words[:1], "beginning", ("start", "open")),
    "last": Task(lambda words, _: words[-1:], "ending", ("finish", "close")),
}  # fmt: skip
# As long as each other.
FRAMES = (
    "{verb} these words : {words}",
    "please {verb} this : {words}",
    "now {verb} these : {words}",
    "can you {verb} : {words}",
    "i say {verb} : {words}",
)


@dataclass(frozen=True)
class Question:
    """A task with its words, and how it is asked for."""

    task: str
    words: tuple[str, ...]
    answer: str
    """One that is right."""
    instruction: str = ""
    is_new_word: bool = False
    """No instruction of the training asks for this task with these words, though for others, and texts have them."""
    is_new_phrasing: bool = False
    """None has this verb in this frame, though it has the frame with others and the verb in others."""

    @property
    def beginning(self) -> str:
        """Of a text, up to the answer."""
        return f"{' '.join(self.words)} , {TASKS[self.task].told} :"

    @property
    def text(self) -> str:
        return f"{self.beginning} {self.answer} ."

    def is_right(self, written: str) -> bool:
        if self.task == "any order":
            return sorted(written.split()) == sorted(self.words)
        return written == self.answer


def words_of(task: str, *, is_new: bool) -> list[str]:
    """Both words of the pairs with which no instruction of the training asks for this task, a quarter of all, or the others."""
    number = list(TASKS).index(task)
    return [
        word for place, pair in enumerate(PAIRS) if ((number + place) % 4 == 0) == is_new for word in pair
    ]


def phrasings(task: str, *, is_new: bool) -> list[str]:
    """The frames with the task's verbs in them, of those that no instruction of the training has, or of the others."""
    number = list(TASKS).index(task)
    return [
        frame.replace("{verb}", verb)
        for second, verb in enumerate(TASKS[task].verbs)
        for place, frame in enumerate(FRAMES)
        if ((number + 2 * second + place) % len(FRAMES) == 0) == is_new
    ]


def draw(task: str, random: Random, *, is_new_word: bool = False, is_new_phrasing: bool = False) -> Question:
    words = tuple(random.sample(words_of(task, is_new=is_new_word), GIVEN))
    instruction = random.choice(phrasings(task, is_new=is_new_phrasing)).format(words=" ".join(words))
    answer = " ".join(TASKS[task].answer(words, random))
    return Question(task, words, answer, instruction, is_new_word, is_new_phrasing)


def asked(number: int) -> list[Question]:
    """Of each task so many in each of four ways: known or new words, in a known or a new phrasing."""
    random = Random("asked")
    return [
        draw(task, random, is_new_word=is_new_word, is_new_phrasing=is_new_phrasing)
        for task in TASKS
        for is_new_word in (False, True)
        for is_new_phrasing in (False, True)
        for _ in range(number)
    ]


def texts(seed: str) -> Iterator[Question]:
    """Without end, of all words with all tasks."""
    random = Random(seed)
    while True:
        task = random.choice(tuple(TASKS))
        words = tuple(random.sample(tuple(OPPOSITES), GIVEN))
        yield Question(task, words, " ".join(TASKS[task].answer(words, random)))


def instructions(seed: str) -> Iterator[Question]:
    """Without end, of known words in known phrasings."""
    random = Random(seed)
    while True:
        yield draw(random.choice(tuple(TASKS)), random)


def vocabulary() -> list[str]:
    """All words there are."""
    lines = [*OPPOSITES, *(word.upper() for word in OPPOSITES), ", : . user assistant"]
    lines += [frame.format(verb="", words="") for frame in FRAMES]
    lines += [" ".join((task.told, *task.verbs)) for task in TASKS.values()]
    return sorted({word for line in lines for word in line.split()})
