"""The gateway as a Ray Serve ingress: the HTTP application of pipelines/serving/routes.py in front of the model's replicas."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, cast

from fastapi import FastAPI

from pipelines.serving.access_log import RequestIds, write_to_stdout
from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.errors import RequestError
from pipelines.serving.events import ReplicaEvent
from pipelines.serving.keys import load_keys
from pipelines.serving.limits import RequestLimits
from pipelines.serving.routes import Access, Health, build_api

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

_log = logging.getLogger(__name__)
_DRAINING = Health("draining", "the endpoint is being taken down")
# How often Serve's controller is asked whether replicas run: soon again while none does.
_ASK_EVERY_S = 3.0
_ASK_SOON_S = 0.25


class Gateway:
    """Ray Serve's ingress deployment. Imports no torch: its process starts fast and stays small."""

    def __init__(
        self,
        denoiser: DeploymentHandle,
        model_id: str,
        retry_after_s: int,
        limits: RequestLimits,
        access: Access,
        api_keys: str | None,
    ) -> None:
        """`api_keys`: where they are (`load_keys`): what Ray stores of its deployments must not hold them. Raises UserError."""
        self._replicas = Replicas(denoiser, retry_after_s)
        self._model_id, self._limits = model_id, limits
        self._access = dataclasses.replace(access, keys=load_keys(api_keys) if api_keys else ())
        write_to_stdout()
        self._replicas.look()  # one that takes over from another is not "starting"
        threading.Thread(target=self._replicas.watch, name="watch-health", daemon=True).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        return build_api(self._replicas, self._model_id, self._limits, self._access)

    async def drain(self, grace_s: float) -> None:
        """Refuse what comes and what waits; returns when the running requests are finished, or after `grace_s`."""
        await self._replicas.drain(grace_s)


class Replicas:
    """The Denoiser deployment as a backend of the HTTP application."""

    def __init__(self, handle: DeploymentHandle, retry_after_s: int) -> None:
        self._handle = handle.options(stream=True)
        self._retry_after_s = retry_after_s
        self._health = Health("starting", "the model is being loaded")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining = asyncio.Event()
        self._open: set[DeploymentResponseGenerator[ReplicaEvent]] = set()
        self._is_over = False  # no request is waited for any more

    async def stream(self, body: SamplingBody, ids: RequestIds) -> AsyncGenerator[ReplicaEvent, None]:
        """The events of one replica. Raises RequestError 429 when the queue is full, 503 when no replica answers or the
        endpoint is taken down before one does."""
        from ray.exceptions import RayActorError, TaskCancelledError
        from ray.serve.exceptions import (
            BackPressureError,
            DeploymentUnavailableError,
            ReplicaUnavailableError,
            RequestCancelledError,
        )

        self._loop = asyncio.get_running_loop()
        if self._draining.is_set():
            raise self._away()
        response = cast("DeploymentResponseGenerator[ReplicaEvent]", self._handle.stream.remote(body, ids))
        self._open.add(response)
        try:
            first = await self._first(response)
            self._health = Health("ok")
            yield first
            async for event in response:
                yield event
        except BackPressureError as error:
            raise RequestError(
                429,
                "too many requests are waiting; try again later",
                code="queue_full",
                retry_after_s=self._retry_after_s,
            ) from error
        except (DeploymentUnavailableError, ReplicaUnavailableError, RayActorError) as error:
            _log.warning("no answer from the model's replicas: %s", error)
            raise self._away() from error
        except (asyncio.CancelledError, RequestCancelledError, TaskCancelledError) as error:
            with contextlib.suppress(Exception):
                response.cancel()
            if self._is_over:
                raise self._away() from error
            raise
        except (GeneratorExit, RequestError):
            # Nobody wants it any more. (Not `finally`: cancel() raises again what the response has failed with.)
            with contextlib.suppress(Exception):
                response.cancel()
            raise
        finally:
            self._open.discard(response)

    async def _first(self, response: DeploymentResponseGenerator[ReplicaEvent]) -> ReplicaEvent:
        """The event by which a replica takes the request, unless the endpoint is taken down before it comes."""
        first = asyncio.ensure_future(anext(response))
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait({first, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                raise self._away()
            return first.result()
        finally:
            first.cancel()
            draining.cancel()

    def _away(self) -> RequestError:
        why = "is being taken down" if self._draining.is_set() else "is not available"
        return RequestError(503, f"the model {why}; try again later", retry_after_s=self._retry_after_s)

    async def drain(self, grace_s: float) -> None:
        """See `Gateway.drain`."""
        self._draining.set()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        while self._open and loop.time() < deadline:
            await asyncio.sleep(0.1)
        self._is_over = True
        for response in self._open:
            with contextlib.suppress(Exception):
                response.cancel()
        await asyncio.sleep(0.5)  # the last bytes are on their way through Ray's proxy

    def health(self) -> Health:
        """What has been seen last, of the controller's view or of an answer."""
        return _DRAINING if self._draining.is_set() else self._health

    def watch(self) -> None:
        """Keep `health` up to date for as long as the process runs. In a thread: the controller is asked synchronously,
        and may be slow to answer."""
        while not self._draining.is_set():
            time.sleep(_ASK_EVERY_S if self._health.status == "ok" else _ASK_SOON_S)
            self.look()
            if self._health == _DRAINING and self._loop is not None:
                # Taken down by somebody else, e.g. with `serve delete`.
                self._loop.call_soon_threadsafe(self._draining.set)

    def look(self) -> None:
        """Bring `health` up to date."""
        try:
            self._health = self._ask()
        except Exception as error:  # the replicas are no worse for a controller that is away
            _log.warning("Serve's controller does not answer: %s", error)

    def _ask(self) -> Health:
        from ray import serve

        application = serve.status().applications.get(self._handle.app_name)
        deployment = application.deployments.get(self._handle.deployment_name) if application else None
        if application is not None and application.status == "DELETING":
            return _DRAINING
        # Serve tells of no deployment while it builds a new version, nor when it could not: the old ones go on.
        if deployment is None:
            return self._health
        running = any(n for state, n in deployment.replica_states.items() if state == "RUNNING")
        # A deployment may be meant to have no replica now.
        if running or deployment.status == "HEALTHY":
            return Health("ok")
        if deployment.status in ("UPDATING", "UPSCALING"):
            return Health("starting", "no replica of the model has started yet")
        return Health("unavailable", "no replica of the model runs; Serve's log says why")
