"""A replica that answers for several models, and holds so many of them at a time (model_cache.py).

Ray Serve sends a request to a replica that has its model, while one of those has a place for it, else to one that has few.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any, NamedTuple

import torch

from llada.errors import UserError
from llada.sampling.config import SamplingConfig
from llada.sampling.engine import DenoiseEngine
from llada.sampling.stats import EngineStats
from pipelines.serving.access_log import RequestIds
from pipelines.serving.checkpoint import check_checkpoint
from pipelines.serving.collector import freeze_loaded
from pipelines.serving.dialects.calls import AnyBody
from pipelines.serving.events import Refused, ReplicaEvent
from pipelines.serving.model_cache import ModelCache
from pipelines.serving.replica import Denoiser
from pipelines.serving.reports import add_stats, report_to_gateway
from pipelines.serving.scaling import MEAN_REQUEST, REPLIES, USUAL_REQUEST, WORK
from pipelines.stage.artifact import fetch_folder

_log = logging.getLogger(__name__)
# A model that could not be loaded is not tried again before: each try takes the time of a load.
_TRY_AGAIN_AFTER_S = 10


class Offered(NamedTuple):
    """A model that may be asked for."""

    url: str
    version: str


class MultiplexedDenoiser:
    """Denoisers of several models, in whose place it stands."""

    def __init__(
        self, models: Mapping[str, Offered], most: int, sampling: SamplingConfig, **settings: Any
    ) -> None:
        """
        Args:
            models: by their names in requests; the first answers those that name none, and is loaded at once.
            most: that are held at a time.
            sampling, settings: of each of them, as of a Denoiser.

        Raises:
            UserError: the first model cannot be served.
        """
        self._models, self._sampling, self._settings = models, sampling, settings
        self._first = next(iter(models))
        self._failures: dict[str, float] = {}
        self._usual = {MEAN_REQUEST: 1.0, USUAL_REQUEST: 1.0}
        self._counting = threading.Lock()
        self._engines: list[DenoiseEngine] = []
        self._of_the_gone = EngineStats()
        self._cache = ModelCache(most, self._prepare, self._load, self._close, _tell_router)
        self._cache.put(self._first, self._open(self._first))
        freeze_loaded()  # torch above all: the models themselves are few objects
        report_to_gateway(self)

    def stats(self) -> EngineStats:
        """What has been done, also by models that are no longer here, and what is to do."""
        total = EngineStats()
        with self._counting:
            for stats in [self._of_the_gone, *(engine.stats() for engine in self._engines)]:
                add_stats(total, stats)
        return total

    async def batches(
        self, body: AnyBody, ids: RequestIds | None = None
    ) -> AsyncGenerator[list[ReplicaEvent], None]:
        """See `Denoiser.batches`. One `Refused` (503) where the request's model cannot be loaded."""
        name = body.model or self._first
        try:
            denoiser = await self._take(name)
        except Exception:
            message = f"the model {name!r} cannot be loaded; the endpoint's log says why"
            yield [Refused(503, message, "model", "model_unavailable", _TRY_AGAIN_AFTER_S)]
            return
        try:
            async with contextlib.aclosing(denoiser.batches(body, ids)) as batches:
                async for events in batches:
                    yield events
        finally:
            del denoiser  # as long as somebody knows it, its memory is not free
            self._cache.give_back(name)

    async def _take(self, name: str) -> Denoiser:
        """Raises what loading it raises; that is logged once for all who have waited for it."""
        if time.monotonic() < self._failures.get(name, 0.0):
            raise UserError(f"{name} could not be loaded a moment ago")
        return await self._cache.take(name)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """See `Denoiser`. Who waits for a model counts as a mean request."""
        said = [await denoiser.record_autoscaling_stats() for denoiser in self._cache.models]
        if said:  # else one goes and another comes
            self._usual = {name: mean(one[name] for one in said) for name in (MEAN_REQUEST, USUAL_REQUEST)}
        waiting = self._cache.num_waiting
        return self._usual | {
            REPLIES: waiting + sum(one[REPLIES] for one in said),
            WORK: waiting * self._usual[MEAN_REQUEST] + sum(one[WORK] for one in said),
        }

    async def canary(self) -> None:
        """Denoise one token with the model that was asked for last. Raises what makes that fail."""
        for name in self._cache.names[-1:]:
            denoiser = await self._cache.take(name)
            try:
                await denoiser.canary()
            finally:
                self._cache.give_back(name)

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        for denoiser in self._cache.models:
            denoiser.check_health()

    def close(self) -> None:
        """May be called twice."""
        for denoiser in self._cache.models:
            denoiser.close()
        gc.unfreeze()

    def __del__(self) -> None:
        if hasattr(self, "_cache"):
            self.close()

    def _prepare(self, name: str) -> None:
        with self._noting_failures(name):
            check_checkpoint(str(fetch_folder(self._models[name].url)))

    def _load(self, name: str) -> Denoiser:
        with self._noting_failures(name):
            _free_memory()
            return self._open(name)

    def _open(self, name: str) -> Denoiser:
        url, version = self._models[name]
        denoiser = Denoiser(url, self._sampling, version=version, is_alone=False, **self._settings)
        with self._counting:
            self._engines.append(denoiser.engine)
        return denoiser

    def _close(self, denoiser: Denoiser) -> None:
        denoiser.close()
        with self._counting:
            self._engines.remove(denoiser.engine)
            add_stats(self._of_the_gone, replace(denoiser.stats(), rows_most=0))

    @contextlib.contextmanager
    def _noting_failures(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failures[name] = time.monotonic() + _TRY_AGAIN_AFTER_S
            message = "the model %s cannot be loaded, and requests for it get status 503: %s"
            # What is no user's to mend keeps its traceback.
            _log.error(message, name, error, exc_info=not isinstance(error, UserError))
            raise


def _free_memory() -> None:
    """Of what has been let go: from Python, from torch to the GPU, and from the C library to the machine."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(
        OSError, AttributeError
    ):  # not every C library keeps freed memory, or can give it back
        ctypes.CDLL(None).malloc_trim(0)


def _tell_router(names: Sequence[str]) -> None:
    """Tell Ray Serve which models are here; without Serve, nobody. (As `serve.multiplexed` does, which has no way to let a
    model stay that is in use.)"""
    from ray import serve
    from ray.serve._private.common import RequestRoutingInfo
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        replica = serve.get_replica_context().replica_id
    except RayServeException:
        return
    client = _get_global_client()
    assert client is not None
    client.record_request_routing_info(RequestRoutingInfo(replica, multiplexed_model_ids=[*names]))
