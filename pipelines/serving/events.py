"""What a replica tells the gateway about a request: the engine's events of all its choices, or one `Refused`."""

from __future__ import annotations

from dataclasses import dataclass

from llada.sampling.events import Finished, Started, Text


@dataclass(frozen=True, slots=True)
class Refused:
    """The only event of a request that cannot be served: an HTTP status and OpenAI's error fields."""

    status: int
    message: str
    param: str | None
    code: str | None


ReplicaEvent = Refused | Started | Text | Finished
