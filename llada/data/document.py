"""The document: the one thing that travels through a preparation, from the reader to the row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

UNKNOWN = "und"
"""The language of a document before, or without, identification: ISO 639-2's "undetermined"."""

_FEW = 0.01
_UNDECODED = "\ufffd".encode()
_MARKS_BORNE = 2  # in a text however short; of NULs, which UTF-16 is full of, one
_SEEN_BYTES = 1 << 9
_CONTROL = bytes([*range(0x09), 0x0B, *range(0x0E, 0x1B), *range(0x1C, 0x20), 0x7F])


class Message(TypedDict):
    """One turn of a dialogue."""

    role: str
    """"system", "user", "assistant" or "tool"."""
    content: str
    tool_calls: NotRequired[list[Any]]
    """What the assistant calls, as {"function": {"name", "arguments"}}."""
    reasoning_content: NotRequired[str]
    """What the assistant thinks before it answers; so are `reasoning` and `thinking`, for templates that call it so."""
    reasoning: NotRequired[str]
    thinking: NotRequired[str]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    """The call that a tool answers."""
    trained: NotRequired[bool]
    """False for an answer that only stands in the history of later ones."""


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
    tools: tuple[Any, ...] = ()
    """Descriptions of the functions that a dialogue's assistant may call."""

    @property
    def size(self) -> int:
        """Characters to encode."""
        return sum(len(m["content"]) for m in self.messages) if self.messages else len(self.text)


def dialogue(messages: Sequence[Message], tools: Sequence[Any] = (), place: str = "") -> Document:
    """A dialogue as a document."""
    text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return Document(text, place, messages=tuple(messages), tools=tuple(tools))


def prompt_answer_pairs(messages: Sequence[Message]) -> list[tuple[list[Message], Message]]:
    """(history, answer) for every assistant message that answers something and is to be learned."""
    told = [cast(Message, {key: value for key, value in m.items() if key != "trained"}) for m in messages]
    return [
        (told[:turn], told[turn])
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
        and message.get("trained", True)
        and any(m["role"] == "user" for m in told[:turn])
    ]


def text_problem(text: Any) -> str | None:
    """Why a value cannot be a text, as a reason for the statistics ("empty_text"), or None.

    A few NULs, control characters and U+FFFD (what stands for bytes that could not be decoded) are borne; many of them
    tell of data that are no text: "nul_character", "control_characters", "undecodable_text".
    """
    if text is None:
        return "null_text"
    if not isinstance(text, str):
        return "text_not_a_string"
    if not text.strip():
        return "empty_text"
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "not_utf8"
    if 1 < data.count(0) > _FEW * len(text):
        return "nul_character"
    if not text.isascii() and _MARKS_BORNE < data.count(_UNDECODED) > _FEW * len(text):
        return "undecodable_text"
    beginning = data[:_SEEN_BYTES]
    controls = len(beginning) - len(beginning.translate(None, _CONTROL))
    return "control_characters" if _MARKS_BORNE < controls > 2 * _FEW * len(beginning) else None
