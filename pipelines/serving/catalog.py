"""Several models behind one endpoint, and of one of them two versions: which replicas a request goes to."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from llada.sampling.events import Started
from pipelines.serving.access_log import RequestIds
from pipelines.serving.backend import Backend, Health
from pipelines.serving.dialects.calls import AnyBody, CallBody
from pipelines.serving.errors import RequestError
from pipelines.serving.events import HandedOn, ReplicaEvent, Restarted, Serving


@dataclass(frozen=True)
class Model:
    """What answers to a name."""

    stable: Backend
    canary: Backend | None = None
    """A new version, which gets some of the requests."""
    canary_share: float = 0.0
    canary_version: str = ""
    """What it is called where requests are counted."""

    def choose(self, ids: RequestIds) -> Backend:
        """By the request's id alone: one that is sent again goes the same way. A canary that does not answer gets none."""
        place = zlib.crc32(ids.request_id.encode()) / 2**32
        if self.canary is None or place >= self.canary_share or self.canary.health().status != "ok":
            return self.stable
        return self.canary


class Catalog:
    """All models, as one backend of the HTTP application."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        """The first of `models` answers those who name none."""
        self._models = models
        self._first = next(iter(models))

    async def stream(self, body: AnyBody, ids: RequestIds) -> AsyncGenerator[ReplicaEvent, None]:
        """As the chosen version's. What a canary cannot take, or loses before the client has had a byte, is the stable version's."""
        model = self._models[body.model or self._first]
        chosen = model.choose(ids)
        if chosen is not model.stable:
            is_seen = has_bytes = False
            try:
                async with contextlib.aclosing(chosen.stream(body, ids)) as events:
                    async for event in events:
                        is_seen = True
                        has_bytes |= body.stream and not isinstance(event, Serving | Started | Restarted)
                        yield event
                return
            except RequestError as error:
                if has_bytes or error.status not in (429, 503):
                    raise
                status = error.status
            if not isinstance(body, CallBody):  # which measures no version
                yield HandedOn(model.canary_version, status)
            if is_seen:
                yield Restarted()
        async with contextlib.aclosing(model.stable.stream(body, ids)) as events:
            async for event in events:
                yield event

    def health(self) -> Health:
        """That of the first model that is not well; a canary's is its own affair."""
        found = {name: model.stable.health() for name, model in self._models.items()}
        for name, health in found.items():
            if health.status != "ok":
                reason = f"{name}: {health.reason}" if len(found) > 1 and health.reason else health.reason
                return Health(health.status, reason)
        return Health("ok")
