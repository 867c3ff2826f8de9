"""The gateway as a Ray Serve ingress: the HTTP application of pipelines/serving/routes.py in front of the model's replicas."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import math
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI

from llada.sampling.events import Finished, Started, Text
from llada.sampling.stats import EngineStats
from pipelines.serving.access_log import RequestIds, write_to_stdout
from pipelines.serving.admission import Admission
from pipelines.serving.backend import Health
from pipelines.serving.catalog import Catalog, Model
from pipelines.serving.collector import freeze_loaded
from pipelines.serving.dialects.calls import AnyBody, CallBody
from pipelines.serving.errors import RequestError
from pipelines.serving.events import ReplicaEvent, Restarted, Serving
from pipelines.serving.keys import follow_keys, load_keys
from pipelines.serving.limits import RequestLimits
from pipelines.serving.metrics import GatewayMetrics
from pipelines.serving.routes import Access, build_api

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

_log = logging.getLogger(__name__)
_DRAINING = Health("draining", "the endpoint is being taken down")
# How often Serve's controller is asked whether replicas run: soon again while none does.
_ASK_EVERY_S = 3.0
_ASK_SOON_S = 0.25
_CANARY_EVERY_S = 30.0
# So often the API keys are read.
_KEYS_EVERY_S = 5.0
_CANARY_TIMEOUT_S = 20.0
# So long likelihoods, of which nothing is heard before their end, may keep all of a replica's places.
_BUSY_S = 180.0
# So much later than its call a request itself is cancelled whose client has left.
_NEWS_S = 0.1


@dataclasses.dataclass(frozen=True)
class Served:
    """A model: its name in requests, the deployment that answers, and that of a canary with its share of the requests.

    Where it is bound these are Applications, of which Serve makes DeploymentHandles in the gateway.
    """

    name: str
    facts: Mapping[str, Any]
    """What /v1/models says of it."""
    stable: Any
    """May be the same of several models."""
    canary: Any = None
    canary_share: float = 0.0
    canary_version: str = ""


class _LostReplicaError(Exception):
    """The replica that a request was at is no more."""


class Gateway:
    """Ray Serve's ingress deployment. Imports no torch: its process starts fast and stays small."""

    def __init__(
        self,
        served: Sequence[Served],
        admission: Callable[[], Admission],
        default_tokens: int,
        limits: RequestLimits,
        access: Access,
        api_keys: str | None,
    ) -> None:
        """
        Args:
            served: the first model answers requests that name none.
            admission: makes that of the replicas of each.
            default_tokens: of a reply whose request does not say.
            api_keys: where they are (`load_keys`): what Ray stores of its deployments must not hold them.

        Raises:
            UserError: bad keys.
        """
        models_of = Counter(model.stable.deployment_name for model in served)
        longest = max(model.facts.get("context_length", default_tokens) for model in served)
        replicas: dict[str, Replicas] = {}

        def replicas_of(handle: DeploymentHandle) -> Replicas:
            if (name := handle.deployment_name) not in replicas:
                first = served[0].name if models_of[name] > 1 else None
                replicas[name] = Replicas(handle, admission(), default_tokens, first, longest)
            return replicas[name]

        self._catalog = Catalog(
            {
                model.name: Model(
                    replicas_of(model.stable),
                    None if model.canary is None else replicas_of(model.canary),
                    model.canary_share,
                    model.canary_version,
                )
                for model in served
            }
        )
        self._replicas = [*replicas.values()]
        self._facts, self._limits = {model.name: model.facts for model in served}, limits
        self._metrics = GatewayMetrics()
        self._api_keys = api_keys
        self._access = dataclasses.replace(access, keys=load_keys(api_keys) if api_keys else ())
        write_to_stdout()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        more = dict(self._facts)
        first = next(iter(more))
        facts = more.pop(first)
        return build_api(
            self._catalog, first, self._limits, self._access, self._metrics, facts, more, self._watching
        )

    @contextlib.asynccontextmanager
    async def _watching(self, api: FastAPI) -> AsyncIterator[None]:
        """Know the replicas' health from before the first request on: what takes over from another is not "starting". And the
        keys, as they come and go."""
        looks = [asyncio.create_task(one.look()) for one in self._replicas]
        await asyncio.wait(looks, timeout=_CANARY_TIMEOUT_S)
        watches = [asyncio.create_task(one.watch()) for one in self._replicas]
        if self._api_keys is not None:
            following = follow_keys(self._api_keys, api.state.accounts, _KEYS_EVERY_S)
            watches.append(asyncio.create_task(following))
        freeze_loaded()
        yield
        gc.unfreeze()
        for each in [*looks, *watches]:
            each.cancel()

    async def report(self, replica: str, stats: EngineStats) -> None:
        """What a replica's engine has done; called by it every few seconds."""
        self._metrics.reports.take(replica, stats)

    async def drain(self, grace_s: float) -> None:
        """Refuse what comes and what waits; returns when the running requests are finished, or after `grace_s`."""
        await asyncio.gather(*(one.drain(grace_s) for one in self._replicas))


class Replicas:
    """A deployment as a backend of the HTTP application: one version of a model, or several models."""

    def __init__(
        self,
        handle: DeploymentHandle,
        admission: Admission,
        default_tokens: int,
        first_model: str | None = None,
        most_tokens: int = 1 << 20,
    ) -> None:
        """
        Args:
            first_model: of replicas of several models the one that requests get which name none.
            most_tokens: that a reply can have. Who asks for more is refused by the replica, and is no such work while he waits.
        """
        if os.environ.get("RAY_SERVE_PROXY_USE_GRPC") == "1":  # SERVE_DIRECTLY
            handle._init(_run_router_in_separate_loop=False)
            handle = handle.options(
                _by_reference=False, request_serialization="pickle", response_serialization="pickle"
            )
        self._handle, self._canary = handle.options(stream=True), handle.canary
        self._first_model = first_model
        self._admission, self._default_tokens, self._most_tokens = admission, default_tokens, most_tokens
        self._answered_at = -math.inf
        self._health = Health("starting", "the model is being loaded")
        self._draining = asyncio.Event()
        self._open: set[DeploymentResponseGenerator[list[ReplicaEvent]]] = set()
        self._is_over = False  # no request is waited for any more

    async def stream(self, body: AnyBody, ids: RequestIds) -> AsyncGenerator[ReplicaEvent, None]:
        """The events of one replica, or of a second one where the first has died before the client had a byte of it. Raises
        RequestError 429 when the queue is full, 503 when no replica answers or the endpoint is taken down before one does."""
        if self._draining.is_set():
            raise self._away()
        # A likelihood, too, takes its forwards, and a question to the tokenizer none.
        tokens = 0 if isinstance(body, CallBody) else body.token_limit or self._default_tokens
        place = self._admission.enter(body.num_prompts * body.n * min(tokens, self._most_tokens))
        is_done = has_bytes = False
        try:
            for is_last in (False, True):
                try:
                    async with contextlib.aclosing(self._ask_replica(body, ids)) as events:
                        async for event in events:
                            place.waits = False
                            has_bytes |= body.stream and not isinstance(event, Serving | Started)
                            is_done = isinstance(event, Finished)
                            yield event
                    return
                except _LostReplicaError as error:
                    if is_last or has_bytes or self._draining.is_set():
                        raise self._away() from error
                    place.waits = True
                    yield Restarted()
        finally:
            place.leave(is_done=is_done)

    async def _ask_replica(self, body: AnyBody, ids: RequestIds) -> AsyncGenerator[ReplicaEvent, None]:
        """The events of one replica. Raises `_LostReplicaError` when it has died, and RequestError 503 as `stream`."""
        from ray.serve.exceptions import DeploymentUnavailableError

        handle = self._handle
        if self._first_model is not None:  # to a replica that has it, if there is one
            handle = handle.options(multiplexed_model_id=body.model or self._first_model)
        response = cast("DeploymentResponseGenerator[list[ReplicaEvent]]", handle.batches.remote(body, ids))
        self._open.add(response)
        try:
            events = await self._first(response)
            while events:
                if any(map(_is_written, events)):
                    self._answered_at = time.monotonic()
                    self._health = Health("ok")
                for event in events:
                    yield event
                events = await anext(response, [])
        except BaseException as error:
            # Nobody wants it any more. (Not `finally`: cancel() raises again what the response has failed with.)
            with contextlib.suppress(Exception):
                response.cancel()
            if isinstance(error, DeploymentUnavailableError):
                _log.warning("no answer from the model's replicas: %s", error)
                raise self._away() from error
            if self._is_over and _is_cancelled(error):
                raise self._away() from error
            if isinstance(error, asyncio.CancelledError) and not _is_wanted(error):
                await asyncio.sleep(_NEWS_S)  # raises, where it is the client who has left
            if _is_loss(error):
                _log.warning("request %s: its replica has died: %r", ids.request_id, error)
                raise _LostReplicaError from error
            raise
        finally:
            self._open.discard(response)

    async def _first(self, response: DeploymentResponseGenerator[list[ReplicaEvent]]) -> list[ReplicaEvent]:
        """The events by which a replica takes the request, unless the endpoint is taken down before they come."""
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
        wait_s = self._admission.retry_after_s()
        return RequestError(503, f"the model {why}; try again later", retry_after_s=wait_s)

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
        await asyncio.sleep(0.5)  # the last bytes are on their way

    def health(self) -> Health:
        """What has been seen last, of the controller's view or of an answer."""
        return _DRAINING if self._draining.is_set() else self._health

    async def watch(self) -> None:
        """Keep `health` up to date until the endpoint is taken down."""
        while not self._draining.is_set():
            await asyncio.sleep(_ASK_EVERY_S if self._health.status == "ok" else _ASK_SOON_S)
            await self.look()
            if self._health == _DRAINING:  # taken down by somebody else, e.g. with `serve delete`
                self._draining.set()

    async def look(self) -> None:
        """Bring `health` up to date."""
        try:
            seen = await asyncio.to_thread(self._ask)  # which may take its time
        except Exception as error:  # the replicas are no worse for a controller that is away
            _log.warning("Serve's controller does not answer: %s", error)
            return
        if seen.status == "ok" and self._admission.num_replicas and not await self._has_answered():
            seen = Health("unavailable", "the model does not answer a request for one token")
        self._health = seen

    async def _has_answered(self) -> bool:
        """Whether a replica answers. What the network has written for users is the proof, for a while; without any, one token is
        asked for."""
        if time.monotonic() - self._answered_at < _CANARY_EVERY_S:
            return True
        try:
            async with asyncio.timeout(_CANARY_TIMEOUT_S):
                await self._canary.remote()
        except (Exception, asyncio.CancelledError) as error:
            if _is_wanted(error):
                raise
            _log.warning("the model does not answer a request for one token: %r", error)
            # It stands behind those that are worked on; but not for ever.
            return bool(self._open) and time.monotonic() - self._answered_at < _BUSY_S
        self._answered_at = time.monotonic()
        return True

    def _ask(self) -> Health:
        from ray.serve.context import _get_global_client

        # Not serve.status(), which first makes objects of all this and pickles a class for it, while no stream goes on.
        client = _get_global_client()
        assert client is not None  # there is a Serve: we are one of its replicas
        application = client.get_serve_details()["applications"].get(self._handle.app_name, {})
        deployment = application.get("deployments", {}).get(self._handle.deployment_name)
        if application.get("status") == "DELETING":
            return _DRAINING
        # Serve tells of no deployment while it builds a new version, nor when it could not: the old ones go on.
        if deployment is None:
            return self._health
        running = sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])
        self._admission.num_replicas = running
        # A deployment may be meant to have no replica now, or in a moment; or it wakes for requests, which wait for it. (One that
        # has never run is "UPDATING".)
        if running or deployment["status"] in ("HEALTHY", "DOWNSCALING", "UPSCALING"):
            return Health("ok")
        if deployment["status"] == "UPDATING":
            return Health("starting", "no replica of the model has started yet")
        return Health("unavailable", "no replica of the model runs; Serve's log says why")


def _is_written(event: ReplicaEvent) -> bool:
    """Whether the network has done something for it: a request is taken before, and an echo needs none."""
    return bool(
        (isinstance(event, Text) and event.completion_tokens) or (isinstance(event, Finished) and event.nfe)
    )


def _is_cancelled(error: BaseException) -> bool:
    from ray.exceptions import TaskCancelledError
    from ray.serve.exceptions import RequestCancelledError

    return isinstance(error, asyncio.CancelledError | RequestCancelledError | TaskCancelledError)


def _is_wanted(error: BaseException) -> bool:
    """Whether it is this task that is to end. (What is cancelled at the other end arrives as CancelledError, too.)"""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _is_loss(error: BaseException) -> bool:
    """Whether a request has failed with its replica, in what Ray's actors and its gRPC calls have to say of that."""
    if isinstance(error, asyncio.CancelledError):
        return not _is_wanted(error)
    from grpc import StatusCode
    from grpc.aio import AioRpcError
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import ReplicaUnavailableError

    if isinstance(error, AioRpcError):
        # What the model's side raises comes as a message. (Other codes: as one that could not be written, or is too long.)
        return error.code() in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
    if isinstance(error, RuntimeError):
        # Of a call whose connection breaks before the replica has said whether it takes it.
        return f"({StatusCode.UNAVAILABLE})" in str(error)
    return isinstance(error, ReplicaUnavailableError | RayActorError)
