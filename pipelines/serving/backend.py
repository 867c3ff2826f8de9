"""What stands behind the HTTP application, normally Ray Serve's deployments (gateway.py): something that answers requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from pipelines.serving.access_log import RequestIds
from pipelines.serving.dialects.calls import AnyBody
from pipelines.serving.events import ReplicaEvent


@dataclass(frozen=True)
class Health:
    """Whether requests can be served, in a word, and why not in a line that a stranger may read."""

    status: Literal["ok", "starting", "unavailable", "draining"]
    reason: str | None = None


class Backend(Protocol):
    """Where the replies come from."""

    def stream(self, body: AnyBody, ids: RequestIds) -> AsyncGenerator[ReplicaEvent, None]:
        """The events of a request. Raises RequestError when there is no place for it; closing it cancels the work."""

    def health(self) -> Health:
        """What is known now; asks nobody."""
