"""The stage `serve`: an OpenAI-compatible endpoint of a checkpoint on Ray Serve.

    HTTP ─▶ Gateway (one, no model) ─▶ Denoiser (autoscaled, one model each, or several) ─▶ llada/sampling/engine.py

`llada serve` starts it for as long as the command runs, and on a Ray of its own the gateway takes the connections itself
(listener.py); on a standing cluster, where Serve's proxies do, `llada deploy ray_configs/serve.yaml` builds the same
application through `build_app`. Waiting requests queue in the gateway, `max_queued_requests` at the most; the next gets
429 with Retry-After.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llada.errors import UserError
from llada.files import local_path
from llada.model.hf import find_dtype
from pipelines.serving.admission import Admission
from pipelines.serving.args import (
    CANARY,
    DENOISER,
    ServeArgs,
    last_part,
    parse_args,
    with_folders,
    with_models,
)
from pipelines.serving.card import model_facts
from pipelines.serving.checkpoint import check_checkpoint, naming, verify_checkpoint
from pipelines.serving.gateway import Gateway, Served
from pipelines.serving.keys import KeyLimits, load_keys
from pipelines.serving.limits import RequestLimits
from pipelines.serving.listener import ListeningGateway, Port, check_port, open_port, url_of
from pipelines.serving.multiplexed import MultiplexedDenoiser, Offered
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import Access
from pipelines.serving.scaling import replicas_for_work
from pipelines.stage.artifact import fetch_folder
from pipelines.stage.cluster import ClusterConfig, connect, load_cluster, require_room
from pipelines.stage.command import Flat, parse, run_command
from pipelines.stage.delivery import registered_name
from pipelines.stage.interruption import interruptible

if TYPE_CHECKING:
    from ray.serve import Application, Deployment

APP_NAME = "llada"
# How often Serve is asked whether it waits for room.
_LOOK_EVERY_S = 5.0
_log = logging.getLogger(__name__)
_USER_ERROR = f"{UserError.__module__}.{UserError.__qualname__}: "  # how a traceback names it


def build_app(args: ServeArgs | dict[str, Any]) -> Application:
    """The Ray Serve application behind Serve's proxy; in a Serve config file, `import_path: pipelines.serve:build_app` and `args`.

    Raises UserError, for a Serve config file Serve's own exception, for what `application` refuses.
    """
    if isinstance(args, ServeArgs):
        return application(args)
    from ray.serve.exceptions import RayServeException

    try:
        return application(with_folders(parse_args(args)))
    except UserError as error:  # any other exception Serve tries again, and shows as a traceback
        raise RayServeException(str(error)) from error


def application(args: ServeArgs, port: Port | None = None) -> Application:
    """The Ray Serve application. `port`: at which its gateway listens itself (listener.py); None: it stands behind Serve's proxy.

    Raises UserError for settings and checkpoints that cannot be served: what is served already goes on. (Of a remote folder, the
    weights' checksums are left to the replicas.)
    """
    facts = {}
    for url in args.models.values():
        facts[url] = model_facts(check_checkpoint(url), args.sampling)
        with naming(url):
            find_dtype(args.dtype)
            if args.verify_checksums and (folder := local_path(url)) is not None:
                verify_checkpoint(Path(folder))
    if args.api_keys is not None:
        load_keys(args.api_keys)  # the gateway reads them again
    gateway, *denoisers = build_deployments(args, listens=port is not None)
    settings = {
        "device": args.device or ("cuda" if args.gpus_per_replica else "cpu"),
        "dtype": args.dtype,
        "max_concurrent": args.ongoing_requests[1],
        "max_prompt_tokens": args.max_prompt_tokens,
        "stall_timeout_s": args.stall_timeout_s,
        "verify_checksums": args.verify_checksums,
        "batch_invariant": args.batch_invariant,
        "compiled": args.compiled,
    }
    versions, bound = _versions(args), {}
    for denoiser in denoisers:
        if denoiser.name == DENOISER and args.models_per_replica is not None:
            offered = {args.name: Offered(args.model, versions[DENOISER])}
            for name, url in args.further_models.items():
                offered[name] = Offered(url, versions[f"{DENOISER}-{name}"])
            bound[denoiser.name] = denoiser.bind(offered, args.models_per_replica, args.sampling, **settings)
        else:
            url, version = args.models[denoiser.name], versions[denoiser.name]
            bound[denoiser.name] = denoiser.bind(url, args.sampling, **settings, version=version)
    canary, share = bound.get(CANARY), args.canary_share if args.canary else 0.0
    version = versions.get(CANARY, "")
    served = [Served(args.name, facts[args.model], bound[DENOISER], canary, share, version)]
    for name, url in args.further_models.items():
        served.append(Served(name, facts[url], bound.get(f"{DENOISER}-{name}", bound[DENOISER])))
    limits = RequestLimits(
        args.max_body_bytes, args.request_timeout_s, choices=args.max_choices, messages=args.max_messages
    )
    access = Access(
        key_limits=KeyLimits(args.key_requests_per_minute, args.key_tokens_per_minute),
        cors_origins=args.cors_origins,
        logs_prompts=args.log_prompts,
        echoes_id=port is not None,
    )
    queue = (args.max_queued_requests, args.ongoing_requests[1], args.retry_after_s)
    tokens = args.sampling.gen_length
    own = {} if port is None else {"counter": port.counter}
    return gateway.bind(served, partial(Admission, *queue), tokens, limits, access, args.api_keys, **own)


def _versions(args: ServeArgs) -> dict[str, str]:
    """{name of a deployment: what its version is called}, the end of its folder's URL."""
    called = {name: last_part(url) for name, url in args.models.items()}
    if called.get(CANARY) == called[DENOISER]:
        called[CANARY] += "-canary"
    return called


def build_deployments(args: ServeArgs, *, listens: bool = False) -> tuple[Deployment, ...]:
    """Gateway, which `listens` itself or stands behind Ray Serve's proxy, and those of `args.deployments`, with their limits;
    arguments are bound by `application`."""
    from ray import serve

    low, high = args.replicas
    target, most = args.ongoing_requests
    # Wide open: it counts its requests itself (admission.py), and /health must answer when there are too many.
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=1,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        max_surge_percent=100,
    )(ListeningGateway if listens else serve.ingress()(Gateway))
    denoiser = serve.deployment(
        name=DENOISER,
        ray_actor_options={
            "num_cpus": 1 if args.cpus_per_replica is None else args.cpus_per_replica,
            "num_gpus": args.gpus_per_replica or 0,
        },
        autoscaling_config={
            "min_replicas": low,
            "max_replicas": high,
            "target_ongoing_requests": target,
            "policy": {"policy_function": f"{replicas_for_work.__module__}:{replicas_for_work.__name__}"},
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
        },
        max_ongoing_requests=most,
        max_queued_requests=-1,  # the gateway's, which counts more exactly than Ray
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        max_surge_percent=args.max_surge_percent,
    )
    return gateway, *(
        denoiser(MultiplexedDenoiser if name == DENOISER and args.models_per_replica else Denoiser).options(
            name=name
        )
        for name in args.deployments
    )


def serve(
    args: ServeArgs, cluster: ClusterConfig, *, blocking: bool = True, tracking_uri: str | None = None
) -> str:
    """Serve a model on a cluster; returns the endpoint's URL.

    Args:
        blocking: wait for Ctrl-C or SIGTERM, then take the endpoint down. False leaves it running on a Ray that was
            there before.
        tracking_uri: of the MLflow that models:/… is looked up in; None: as `default_tracking_uri` says.

    Raises:
        UserError: no model, no cluster, a port in use, or a deployment that does not become healthy.
    """
    import ray
    import ray.serve  # before `connect`, which sends to the log what Ray's loggers would print

    is_own = cluster.address is None and not ray.is_initialized()
    if is_own and not blocking:
        raise UserError(
            "serve: without blocking, the endpoint would end at once; give a running cluster's address"
        )
    args = dataclasses.replace(
        args,
        **{
            name: getattr(cluster, name)
            for name in ("min_replicas", "max_replicas", "cpus_per_replica", "gpus_per_replica")
            if getattr(args, name) is None
        },
    )
    asked, found = args, with_folders(args, tracking_uri)
    # The replicas of a Ray of our own will see what we see: fail before anything starts.
    args = _fetched(found) if cluster.address is None else found
    if cluster.address is None and not is_own and not _serve_runs():
        check_port(args.host, args.port)  # Serve itself reports a port in use after minutes
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(open_port(args.host, args.port)) if is_own else None
        stack.enter_context(interruptible())
        log = stack.enter_context(connect(cluster, tempfile.mkdtemp(prefix="llada-serve-")))
        start_app(args, str(log), port)
        url = _url() if port is None else port.url
        if blocking:
            print(_greeting(args, url, str(log)), flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                _follow_aliases(asked, found, port, tracking_uri, is_local=cluster.address is None)
            _take_down(args.graceful_shutdown_timeout_s, keep_ray=not is_own)
    return url


def start_app(args: ServeArgs, log: str, port: Port | None) -> None:
    """Start Serve on the Ray that we have joined, if need be, and run the application; returns once requests are answered.

    `port`: see `application`. None: the cluster goes on without us, so what does not start is removed from it, unless an
    earlier deployment of the application goes on answering. `log`: where Ray's words go, for errors. Raises UserError.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    least = max(args.replicas[0], 1) * len(args.deployments)
    cpus = 1 if args.cpus_per_replica is None else args.cpus_per_replica
    require_room("min_replicas", least, cpus, args.gpus_per_replica or 0)
    app = application(args, port)
    is_redeploy = _serve_runs() and APP_NAME in serve.status().applications
    try:
        if port is None:
            serve.start(http_options={"host": args.host, "port": args.port})
        else:
            serve.start(proxy_location="Disabled")
        with _saying_what_is_missing():
            serve.run(app, name=APP_NAME)
    except BaseException as error:  # Ctrl-C as well: what has been begun must not stay
        failure = _replica_failure()
        if port is None and not is_redeploy:
            with contextlib.suppress(Exception):
                serve.delete(APP_NAME)
        if isinstance(error, TimeoutError | RayServeException):
            raise UserError(f"the endpoint did not start: {error} (log: {log})") from error
        if isinstance(error, RuntimeError) and failure:
            reason = failure.splitlines()[-1]
            if reason.startswith(_USER_ERROR):
                reason = reason.removeprefix(_USER_ERROR)
                raise UserError(f"the endpoint did not start: {reason} (log: {log})") from error
            raise RuntimeError(f"the endpoint did not start; in its replica:\n{failure}") from error
        raise


def _url() -> str:
    """Of a Serve that ran before, not what was asked for."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    return url_of(client.http_config.host, client.http_config.port)


def _fetched(args: ServeArgs) -> ServeArgs:
    """With the models' folders on this machine. Raises UserError."""

    def fetch(url: str) -> str:
        check_checkpoint(url)
        return str(fetch_folder(url).resolve())

    return with_models(dataclasses.replace(args, model_id=args.name), fetch)


def _follow_aliases(
    asked: ServeArgs, served: ServeArgs, port: Port | None, tracking_uri: str | None, *, is_local: bool
) -> None:
    """For ever: where an alias of the registry points to another version, let that take over. Serve starts it beside the old
    one, which answers until then; what does not start changes nothing and is one line."""
    from ray import serve

    told = served
    if not any(registered_name(url) for url in asked.models.values()):
        threading.Event().wait()
    while True:
        time.sleep(asked.alias_poll_s)
        try:
            now = with_folders(asked, tracking_uri)
        except UserError as error:  # the registry is away: what is served goes on
            _log.warning("%s", error)
            continue
        if now == served:
            continue
        try:
            app = application(_fetched(now) if is_local else now, port)
        except (
            Exception
        ) as error:  # of its store, too: nothing that is wrong with a version ends the one before
            if told != now:
                _warn_of_new(error)
            told = now
            if not _may_pass(error):
                served = now
            continue
        served = now
        try:
            with _saying_what_is_missing():
                serve.run(app, name=APP_NAME)
        except Exception as error:
            _warn_of_new(error)
        else:
            print(f"now serving {', '.join(now.models.values())}", flush=True)


def _may_pass(error: BaseException) -> bool:
    """Whether it is of a store that may come back."""
    return any(isinstance(e, OSError) or getattr(e, "may_pass", False) for e in (error, error.__cause__))


def _warn_of_new(error: Exception) -> None:
    lines = (_replica_failure() or str(error) or repr(error)).splitlines()
    _log.warning("the new version does not start, and the old one goes on: %s", lines[-1])


@contextlib.contextmanager
def _saying_what_is_missing() -> Iterator[None]:
    """For a `with` block that waits for the application: where its cluster has no room for a replica, Serve waits without
    a word until there is some."""
    from ray import serve

    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(_LOOK_EVERY_S):
            with contextlib.suppress(Exception):
                for deployment in serve.status().applications[APP_NAME].deployments.values():
                    if "to be scheduled" in deployment.message:
                        _log.warning("the endpoint waits: %s", deployment.message)
                        return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _serve_runs() -> bool:
    """Whether the Ray that this process has joined has a Serve already."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None


def _replica_failure() -> str | None:
    """The traceback of the replica that did not start, as Serve knows it."""
    from ray import serve

    with contextlib.suppress(Exception):
        for deployment in serve.status().applications[APP_NAME].deployments.values():
            if deployment.status in ("DEPLOY_FAILED", "UNHEALTHY") and deployment.message.strip():
                return deployment.message.strip()
    return None


def _greeting(args: ServeArgs, url: str, log: str) -> str:
    body = json.dumps(
        {"model": args.name, "messages": [{"role": "user", "content": "Hello!"}], "stream": True}
    )
    return f"""serving {args.name} at {url}   (page: {url}/   health: {url}/health   log: {log})

  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'
"""


def _take_down(grace_s: float, *, keep_ray: bool) -> None:
    """Let the running requests finish, `grace_s` at the most, while those that wait or come are answered with 503; then
    remove the application. (On a Ray of our own it ends with that: without the application, Serve answers 404.)"""
    from ray import serve

    print("taking the endpoint down when its requests are finished; Ctrl-C again to stop at once", flush=True)
    with contextlib.suppress(KeyboardInterrupt, Exception):  # what is broken is taken down all the same
        gateway = serve.get_app_handle(APP_NAME)
        if not gateway.is_initialized:
            gateway._init(_run_router_in_separate_loop=True)  # there is no event loop here
        gateway.drain.remote(grace_s).result(timeout_s=grace_s + 10)
    if keep_ray:
        with contextlib.suppress(KeyboardInterrupt, TimeoutError):
            serve.delete(APP_NAME)


@dataclasses.dataclass(frozen=True)
class ServeCommandArgs:
    """An OpenAI-compatible endpoint of a checkpoint."""

    args: Annotated[ServeArgs, Flat]
    cluster: str | None = None
    """Cluster file; without one, a Ray of its own on this machine."""
    tracking_uri: str | None = None
    """MLflow of models:/…; default $MLFLOW_TRACKING_URI, else mlflow.db in this folder."""


def main(argv: Sequence[str]) -> None:
    """`llada serve …`"""
    command = parse(ServeCommandArgs, argv, "serve")
    serve(command.args, load_cluster(command.cluster), tracking_uri=command.tracking_uri)


if __name__ == "__main__":
    run_command("serve")
