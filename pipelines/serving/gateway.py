"""The gateway as a Ray Serve ingress: the HTTP application of pipelines/serving/routes.py in front of the model's replicas."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, cast

from fastapi import FastAPI

from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.errors import RequestError
from pipelines.serving.events import ReplicaEvent
from pipelines.serving.routes import build_api

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

_log = logging.getLogger(__name__)


class Gateway:
    """Ray Serve's ingress deployment. Imports no torch: its process starts fast and stays small."""

    def __init__(self, denoiser: DeploymentHandle, model_id: str, retry_after_s: int) -> None:
        self._replicas = Replicas(denoiser, retry_after_s)
        self._model_id = model_id

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        return build_api(self._replicas, self._model_id)


class Replicas:
    """The Denoiser deployment as a backend of the HTTP application."""

    def __init__(self, handle: DeploymentHandle, retry_after_s: int) -> None:
        self._handle = handle.options(stream=True)
        self._retry_after_s = retry_after_s

    async def stream(self, body: SamplingBody) -> AsyncGenerator[ReplicaEvent, None]:
        """The events of one replica. Raises RequestError 429 when the queue is full, 503 when no replica answers."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import (
            BackPressureError,
            DeploymentUnavailableError,
            ReplicaUnavailableError,
        )

        response = cast("DeploymentResponseGenerator[ReplicaEvent]", self._handle.stream.remote(body))
        try:
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
            raise RequestError(
                503, "the model is not available; try again later", retry_after_s=self._retry_after_s
            ) from error
        except (asyncio.CancelledError, GeneratorExit):
            # The client has gone. (Not `finally`: cancel() raises again what the response has failed with.)
            with contextlib.suppress(Exception):
                response.cancel()
            raise

    async def unhealthy(self) -> str | None:
        """Asks Serve's controller: a replica that runs, or a deployment that is meant to have none now."""
        # In a thread: the controller is asked synchronously.
        return await asyncio.to_thread(self._unhealthy)

    def _unhealthy(self) -> str | None:
        from ray import serve

        application = serve.status().applications.get(self._handle.app_name)
        deployment = application.deployments.get(self._handle.deployment_name) if application else None
        if deployment is None:
            return "the application is being taken down"
        if deployment.status == "HEALTHY" or any(
            n for state, n in deployment.replica_states.items() if state == "RUNNING"
        ):
            return None
        return f"{deployment.status}: {deployment.message}"
