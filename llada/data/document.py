"""The document: the one thing that travels through a preparation, from the reader to the row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

UNKNOWN = "und"
"""The language of a document before, or without, identification: ISO 639-2's "undetermined"."""


class Message(TypedDict):
    """One turn of a dialogue."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """A text and what is known about it. A step that changes it makes a new one."""

    text: str
    """Of a dialogue, its messages one after the other, each with its role."""
    place: str = ""
    """Where it was read: URL:line."""
    url: str | None = None
    """Where it was published, when its record says so."""
    language: str = UNKNOWN
    """A language code, once it was identified."""
    messages: tuple[Message, ...] = ()
    """The turns of a dialogue; empty for plain text."""

    @property
    def size(self) -> int:
        """Characters to encode."""
        return sum(len(m["content"]) for m in self.messages) if self.messages else len(self.text)


def dialogue(messages: Sequence[Message]) -> Document:
    """A dialogue as a document."""
    text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return Document(text, messages=tuple(messages))


def prompt_answer_pairs(messages: Sequence[Message]) -> list[tuple[list[Message], str]]:
    """(history, answer) for every assistant message that answers something."""
    return [
        (list(messages[:turn]), message["content"])
        for turn, message in enumerate(messages)
        if message["role"] == "assistant" and any(m["role"] == "user" for m in messages[:turn])
    ]


def text_problem(text: Any) -> str | None:
    """Why a value cannot be a text, as a reason for the statistics ("empty_text"), or None."""
    if text is None:
        return "null_text"
    if not isinstance(text, str):
        return "text_not_a_string"
    if not text.strip():
        return "empty_text"
    if "\x00" in text:
        return "nul_character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "not_utf8"
    return None
