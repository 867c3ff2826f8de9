"""What a replica tells the gateway about a request, in this order: Started, then for each choice Text … Finished."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """The only event of a request that cannot be served: an HTTP status and OpenAI's error fields."""

    status: int
    message: str
    param: str | None
    code: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """The request has left the queue."""


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """More text of a choice; `canvas` is its whole draft: texts and, between them, numbers of masks."""

    index: int
    text: str
    canvas: tuple[str | int, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """The end of a choice."""

    index: int
    reason: str  # "stop" or "length"
    prompt_tokens: int
    completion_tokens: int
    forwards: int


Event = Refused | Started | Text | Finished
