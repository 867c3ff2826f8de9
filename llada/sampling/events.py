"""What the engine says about a request, in this order: Started, then Text as it becomes readable, with Drafts in between
where they were asked for, then Finished.

One vocabulary from the engine's thread to the HTTP stream. No torch here: the front process reads these too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Started:
    """The request has left the queue."""

    index: int
    """Which of the choices that were asked for together."""
    prompt_tokens: int = field(default=0, compare=False)
    """As `Finished` will have them."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a reply, and how it came to be there."""

    id: int
    raw: bytes
    """What it stands for, maybe a part of a character; of a special token, whose text does not show, its name."""
    block: int
    """Of the canvas, counted from 0."""
    step: int | None
    """The 0-based forward of its reply that it came from; None: it was given."""
    logprob: float | None
    """Of the model's probability of it in that forward, among what may stand at its place; None: it was given."""
    top: tuple[tuple[bytes, float], ...] = ()
    """As many as were asked for of the likeliest tokens there: what they stand for, and their log-probabilities."""
    is_special: bool = False
    """It does not show in text."""

    @property
    def text(self) -> str:
        return show_bytes(self.raw)


def show_bytes(spelled: bytes) -> str:
    """Bytes as text; where they are none, written \\xf0 and the like."""
    return spelled.decode("utf-8", errors="backslashreplace")


@dataclass(frozen=True, slots=True)
class Text:
    """Text that was committed."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    """Where they were asked for: those that have become readable. Their last text may be held back (a character or a stop
    string that is not complete) and come later."""
    completion_tokens: int = field(default=0, compare=False)
    """Of the reply so far."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A reply after a forward, masks and all, up to its end token; each tuple has an entry for each token."""

    index: int
    forwards: int
    """Of the reply so far: what the last one has committed has the step `forwards` − 1."""
    block: tuple[int, int]
    """The tokens [from, to) of the block that is worked on."""
    tokens: tuple[str | None, ...]
    """Texts; None is a mask. A character of several tokens stands at the last of them."""
    steps: tuple[int | None, ...]
    """As `Token.step`; None of a mask."""
    confidences: tuple[float | None, ...]
    """The probability that is `Token.logprob`; None of a mask, and of what was given."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a choice."""

    index: int
    reason: FinishReason
    """"stop": an end token or stop string; "length": the canvas is full."""
    prompt_tokens: int
    """Suffix included."""
    completion_tokens: int
    """Up to the end token (not counted) or the stop string (counted)."""
    nfe: int
    """Forwards of the network."""
    end: Token | None = None
    """Where tokens were asked for: the end token, if there is one, which is none of the reply's."""


Event = Started | Text | Draft | Finished
