"""What a replica tells the gateway about a request: `Serving` and the engine's events of its choices, or one `Refused`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llada.sampling.events import Draft, Finished, Started, Text


@dataclass(frozen=True, slots=True)
class Serving:
    """The first event of a request: a replica has taken it."""

    fingerprint: str
    """Of what answers: OpenAI's system_fingerprint."""
    run_id: str | None = None
    """The MLflow run that made the checkpoint, where it has one."""
    version: str | None = None
    """Of the model that is asked, as its endpoint calls it; None: its tokenizer is."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The only event of a request that cannot be served: an HTTP status and OpenAI's error fields."""

    status: int
    message: str
    param: str | None
    code: str | None
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class Restarted:
    """The replica has died before the client had a byte; another begins anew, and what came before is void."""


@dataclass(frozen=True, slots=True)
class HandedOn:
    """A canary could not take the request, or has lost it before the client had a byte: the stable version gets it."""

    version: str
    """The canary's."""
    status: int
    """What the client would have got."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The only event, after `Serving`, of a request that asks for no reply: the JSON of the answer."""

    content: dict[str, Any]


Written = Answer | Started | Text | Draft | Finished
"""What an answer is made of."""
ReplicaEvent = Refused | Restarted | HandedOn | Serving | Written
