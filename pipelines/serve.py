"""The stage `serve`: an OpenAI-compatible endpoint of a checkpoint on Ray Serve.

    HTTP ─▶ Gateway (one, no model) ─▶ Denoiser (autoscaled, one model each) ─▶ llada/sampling/engine.py

`llada serve` starts it for as long as the command runs; on a standing cluster, `llada deploy ray_configs/serve.yaml`
builds the same application through `build_app`. Waiting requests queue in the gateway, `max_queued_requests` at the
most; the next gets 429 with Retry-After.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llada.errors import UserError
from llada.files import local_path
from llada.model.hf import find_dtype
from llada.sampling.config import SamplingConfig
from llada.settings import check_limits, from_dict, limited, merge_settings, require
from pipelines.serving.admission import Admission
from pipelines.serving.card import model_facts
from pipelines.serving.checkpoint import check_checkpoint, naming, verify_checkpoint
from pipelines.serving.gateway import Gateway
from pipelines.serving.keys import KeyLimits, load_keys
from pipelines.serving.limits import RequestLimits
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import Access
from pipelines.serving.scaling import replicas_for_work
from pipelines.stage.artifact import fetch_folder
from pipelines.stage.cluster import ClusterConfig, connect, load_cluster, require_room
from pipelines.stage.command import Flat, parse, run_command
from pipelines.stage.delivery import model_folder, registered_name
from pipelines.stage.interruption import interruptible
from pipelines.stage.tracking import default_tracking_uri

if TYPE_CHECKING:
    from ray.serve import Application, Deployment

APP_NAME = "llada"
# How often Serve is asked whether it waits for room.
_LOOK_EVERY_S = 5.0
_log = logging.getLogger(__name__)
_USER_ERROR = f"{UserError.__module__}.{UserError.__qualname__}: "  # how a traceback names it


def default_sampling() -> SamplingConfig:
    """A forward for each token, and shorter blocks than LLaDA's generate.py: a stream grows at least once in each."""
    return SamplingConfig(gen_length=128, steps=None, block_length=32)


@dataclasses.dataclass(frozen=True)
class ServeArgs:
    """One model behind one endpoint. None in the four replica fields: the cluster file decides, else 1 CPU."""

    model: str
    """Checkpoint folder at any fsspec URL, a local one that is on every node, or one of MLflow's registry,
    models:/NAME@ALIAS."""
    model_id: str | None = None
    """The model's name in requests; None takes the folder's, or the registered one."""
    device: str | None = None
    """Where the weights are; None: "cuda" when a replica has a GPU, else "cpu"."""
    dtype: str | None = None
    """Of the weights, e.g. bfloat16; None keeps the file's."""
    verify_checksums: bool = True
    """Read all weights before they are loaded, and refuse those that are not the manifest's. False for huge models."""
    sampling: SamplingConfig = dataclasses.field(default_factory=default_sampling)
    """Of requests that do not choose; gen_length is their max_tokens."""
    batch_invariant: bool = False
    """Also in bf16, and at some cost, a seed's text does not depend on the requests beside it."""
    compiled: bool = False
    """Compile the network as a replica starts, which takes up to a minute: a forward has fewer kernels then, which is meant for
    GPUs, while a CPU gains little. Needs g++ there, on a GPU Triton and gcc."""

    min_replicas: int | None = limited(None, low=0)
    """0 lets the model go when nobody asks (the first request then waits for it to load)."""
    max_replicas: int | None = limited(None, low=1)
    """As many as the load asks for, up to this; None: no more than min_replicas."""
    cpus_per_replica: float | None = limited(None, low=0)
    """CPUs that Ray sets aside for a replica."""
    gpus_per_replica: float | None = limited(None, low=0)
    """GPUs of a replica; 0.5 puts two on one."""
    target_ongoing_requests: float | None = limited(None, above=0)
    """Work for each replica, running and queued, that autoscaling aims at, in requests as `sampling` has them: one that asks for
    more tokens or replies counts for more, one that is half done for half; None: half of max_ongoing_requests."""
    upscale_delay_s: float = limited(15, low=0)
    """Seconds of more load before replicas are added."""
    downscale_delay_s: float = limited(300, low=0)
    """Seconds of less load before replicas are removed."""
    max_surge_percent: int = limited(100, low=0, high=100)
    """Replicas that a redeploy may start beside the old ones, which go when the new ones answer. 0, where there is no room
    for both, stops the old ones first: then nobody answers until the new ones have started."""

    max_ongoing_requests: int | None = limited(None, low=1)
    """Requests that a replica takes at a time; they share its forwards. None: 8, or twice a larger
    target_ongoing_requests."""
    max_queued_requests: int = limited(64, low=-1)
    """Requests that may wait beside those that the replicas take; -1 for any number."""
    retry_after_s: int = limited(5, low=0)
    """What a rejected client is told to wait until it is known how fast the queue goes."""
    max_choices: int = limited(32, low=1)
    """Prompts times n in one request."""
    max_messages: int = limited(1024, low=1)
    """Turns of the conversation in one request."""
    max_prompt_tokens: int | None = limited(None, low=1)
    """Of a prompt with its suffix; None: what the model's context holds."""
    max_body_bytes: int = limited(4 << 20, low=1024)
    """Of one request's JSON."""
    request_timeout_s: float = limited(3600, above=0)
    """From a request's first byte to the last one of its answer, streamed or not."""
    graceful_shutdown_timeout_s: float = limited(120, low=0)
    """What a replica that is scaled down, and the endpoint when it is taken down, get to finish their requests."""
    stall_timeout_s: float = limited(600, above=0)
    """A replica whose forward takes longer is replaced."""

    api_keys: str | None = None
    """Who may ask: a file with one key a line, at any fsspec URL that the gateway's machine reads too, or env:NAME for that
    variable of its environment. None: everybody who reaches the port."""
    key_requests_per_minute: float | None = limited(None, above=0)
    """Requests that each key has in a minute; then 429 with Retry-After."""
    key_tokens_per_minute: float | None = limited(None, above=0)
    """Tokens of prompts and replies that each key has in a minute: what is begun is finished, and then waited for."""
    cors_origins: tuple[str, ...] = ()
    """Sites whose pages may ask from a browser, as https://chat.example.org; "*": any."""
    log_prompts: bool = False
    """The access log (a line of JSON for each request, on the gateway's standard output) has the prompts as well."""

    host: str = "127.0.0.1"
    """Address of a Serve started here; 0.0.0.0 opens it to the network. A running Serve keeps its own."""
    port: int = limited(8000, low=0, high=65535)
    """Port of a Serve started here."""

    def __post_init__(self) -> None:
        check_limits(self, "serve")
        low, high = self.replicas
        require(high >= low, f"serve: max_replicas {high} is below min_replicas {low}")
        require(self.max_queued_requests != 0, "serve: max_queued_requests must be -1 or at least 1, not 0")
        for name in ("key_requests_per_minute", "key_tokens_per_minute"):
            require(getattr(self, name) is None or self.api_keys is not None, f"serve: {name} needs api_keys")
        for origin in self.cors_origins:
            require(
                origin == "*" or re.fullmatch(r"https?://[^/\s*]+", origin) is not None,
                f"serve: cors_origins must be like https://chat.example.org or '*', not {origin!r}",
            )
        target, most = self.ongoing_requests
        require(
            target <= most,
            f"serve: target_ongoing_requests {target:g} must be at most max_ongoing_requests {most}",
        )

    @property
    def ongoing_requests(self) -> tuple[float, int]:
        """Of a replica: what autoscaling aims at, and the most that it takes."""
        target, most = self.target_ongoing_requests, self.max_ongoing_requests
        if most is None:
            most = max(8, math.ceil(2 * (target or 0)))
        return most / 2 if target is None else target, most

    @property
    def replicas(self) -> tuple[int, int]:
        """Fewest and most replicas."""
        low = 1 if self.min_replicas is None else self.min_replicas
        return low, max(low, 1) if self.max_replicas is None else self.max_replicas

    @property
    def name(self) -> str:
        return self.model_id or self.model.rstrip("/").rsplit("/", 1)[-1]


def parse_args(values: dict[str, Any]) -> ServeArgs:
    """ServeArgs from a YAML mapping. Raises UserError for an unknown key (naming the nearest) or a wrong type."""
    defaults = {"sampling": dataclasses.asdict(default_sampling())}
    return from_dict(ServeArgs, merge_settings(defaults, values))


def with_folder(args: ServeArgs) -> ServeArgs:
    """A model of MLflow's registry as the folder that it is now, under its registered name. Raises UserError."""
    folder = model_folder(
        args.model, default_tracking_uri("endpoint")
    )  # there is no output that it would stand beside
    if folder == args.model:
        return args
    return dataclasses.replace(args, model=folder, model_id=args.model_id or registered_name(args.model))


def build_app(args: ServeArgs | dict[str, Any]) -> Application:
    """The Ray Serve application; in a Serve config file, `import_path: pipelines.serve:build_app` and `args`.

    Raises UserError, for a Serve config file Serve's own exception, for settings and checkpoints that cannot be served:
    what is served already goes on. (Of a remote folder, the weights' checksums are left to the replicas.)
    """
    if not isinstance(args, ServeArgs):
        from ray.serve.exceptions import RayServeException

        try:
            return build_app(with_folder(parse_args(args)))
        except UserError as error:  # any other exception Serve tries again, and shows as a traceback
            raise RayServeException(str(error)) from error
    config = check_checkpoint(args.model)
    with naming(args.model):
        find_dtype(args.dtype)
        if args.verify_checksums and (folder := local_path(args.model)) is not None:
            verify_checkpoint(Path(folder))
    if args.api_keys is not None:
        load_keys(args.api_keys)  # the gateway reads them again
    gateway, denoiser = build_deployments(args)
    model = denoiser.bind(
        args.model,
        args.sampling,
        device=args.device or ("cuda" if args.gpus_per_replica else "cpu"),
        dtype=args.dtype,
        max_concurrent=args.ongoing_requests[1],
        max_prompt_tokens=args.max_prompt_tokens,
        stall_timeout_s=args.stall_timeout_s,
        verify_checksums=args.verify_checksums,
        batch_invariant=args.batch_invariant,
        compiled=args.compiled,
    )
    limits = RequestLimits(
        args.max_body_bytes, args.request_timeout_s, choices=args.max_choices, messages=args.max_messages
    )
    access = Access(
        key_limits=KeyLimits(args.key_requests_per_minute, args.key_tokens_per_minute),
        cors_origins=args.cors_origins,
        logs_prompts=args.log_prompts,
        echoes_id=False,
    )
    admission = Admission(args.max_queued_requests, args.ongoing_requests[1], args.retry_after_s)
    tokens = args.sampling.gen_length
    facts = model_facts(config, args.sampling)
    return gateway.bind(model, args.name, admission, tokens, limits, access, args.api_keys, facts)


def build_deployments(args: ServeArgs) -> tuple[Deployment, Deployment]:
    """Gateway and Denoiser with their limits; arguments are bound by `build_app`."""
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
    )(serve.ingress()(Gateway))
    denoiser = serve.deployment(
        name="Denoiser",
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
    )(Denoiser)
    return gateway, denoiser


def serve(args: ServeArgs, cluster: ClusterConfig, *, blocking: bool = True) -> str:
    """Serve a model on a cluster; returns the endpoint's URL.

    Args:
        blocking: wait for Ctrl-C or SIGTERM, then take the endpoint down. False leaves it running on a Ray that was
            there before.

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
    if cluster.address is None:  # the replicas will see what we see: fail before anything starts
        check_checkpoint(args.model)
        folder = fetch_folder(args.model)
        args = dataclasses.replace(args, model=str(folder.resolve()), model_id=args.name)
    if cluster.address is None and not (ray.is_initialized() and _serve_runs()):
        _check_port(args.host, args.port)
    with interruptible(), connect(cluster, tempfile.mkdtemp(prefix="llada-serve-")) as log:
        url = _deploy(args, str(log), keep_ray=not is_own)
        if blocking:
            print(_greeting(args, url, str(log)), flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
            _take_down(args.graceful_shutdown_timeout_s, keep_ray=not is_own)
    return url


def _deploy(args: ServeArgs, log: str, *, keep_ray: bool) -> str:
    """Start Serve if need be and run the application; returns its URL once requests are answered.

    `keep_ray`: the cluster goes on without us, so what does not start is removed from it, unless an earlier deployment
    of the application goes on answering.
    """
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    least = max(args.replicas[0], 1)
    cpus = 1 if args.cpus_per_replica is None else args.cpus_per_replica
    require_room("min_replicas", least, cpus, args.gpus_per_replica or 0)
    app = build_app(args)
    is_redeploy = _serve_runs() and APP_NAME in serve.status().applications
    try:
        serve.start(http_options={"host": args.host, "port": args.port})
        with _saying_what_is_missing():
            serve.run(app, name=APP_NAME)
    except BaseException as error:  # Ctrl-C as well: what has been begun must not stay
        failure = _replica_failure()
        if keep_ray and not is_redeploy:
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
    client = _get_global_client()
    assert client is not None
    http = client.http_config  # of a Serve that ran before, not what was asked for
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(http.host, http.host)
    return f"http://{host}:{http.port}"


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


def _check_port(host: str, port: int) -> None:
    """Before Ray starts: Serve itself reports a port in use after minutes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --port"
            ) from None


def _take_down(grace_s: float, *, keep_ray: bool) -> None:
    """Let the running requests finish, `grace_s` at the most, while those that wait or come are answered with 503; then
    remove the application. (On a Ray of our own it ends with that: without the application, Serve answers 404.)"""
    from ray import serve

    print("taking the endpoint down when its requests are finished; Ctrl-C again to stop at once", flush=True)
    with contextlib.suppress(KeyboardInterrupt, Exception):  # what is broken is taken down all the same
        serve.get_app_handle(APP_NAME).drain.remote(grace_s).result(timeout_s=grace_s + 10)
    if keep_ray:
        with contextlib.suppress(KeyboardInterrupt, TimeoutError):
            serve.delete(APP_NAME)


@dataclasses.dataclass(frozen=True)
class ServeCommandArgs:
    """An OpenAI-compatible endpoint of a checkpoint."""

    args: Annotated[ServeArgs, Flat]
    cluster: str | None = None
    """Cluster file; without one, a Ray of its own on this machine."""


def main(argv: Sequence[str]) -> None:
    """`llada serve …`"""
    command = parse(ServeCommandArgs, argv, "serve")
    serve(with_folder(command.args), load_cluster(command.cluster))


if __name__ == "__main__":
    run_command("serve")
