"""What the engine says about a request, in this order: Started, then Text as it becomes readable, then Finished.

One vocabulary from the engine's thread to the HTTP stream. No torch here: the front process reads these too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Started:
    """The request has left the queue."""

    index: int
    """Which of the choices that were asked for together."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text that was committed; `canvas` is the whole draft: texts and, between them, numbers of masks."""

    index: int
    text: str
    canvas: tuple[str | int, ...] | None = None


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
    reveal_step: tuple[int, ...] | None = None
    """Where it was asked for: the 0-based forward that each of those tokens came from, -1 for one that was given."""
    confidence: tuple[float | None, ...] | None = None
    """Where it was asked for: the model's probability of each of those tokens in that forward, among what may stand at its
    place; None for one that was given."""


Event = Started | Text | Finished
