"""What an endpoint is: the models and their names, how each is run, how many copies there are, what a request may ask for.

The settings of `llada serve`, of `args` in a Serve configuration, and of what `llada deploy` sends.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from llada.sampling.config import SamplingConfig
from llada.settings import check_limits, from_dict, limited, merge_settings, require
from pipelines.stage.delivery import model_folder, registered_name
from pipelines.stage.tracking import default_tracking_uri

DENOISER = "Denoiser"
"""The deployment of the model that requests get which name none."""
CANARY = f"{DENOISER}_canary"
"""That of its new version."""
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


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
    more_models: tuple[str, ...] = ()
    """Further models behind the same endpoint, each as NAME=URL: a request chooses one by its name."""
    models_per_replica: int | None = limited(None, low=1)
    """Models that a replica holds at a time. All models then share the replicas: one is loaded when it is first asked for, and
    the one that was asked for longest ago goes for it, as soon as none of its requests runs. None: each model has replicas of
    its own, as many as this one; with min_replicas 0, those of a model that nobody asks for go."""
    canary: str | None = None
    """A new version of the model, a folder or models:/NAME@ALIAS, with replicas of its own in any case."""
    canary_share: float = limited(0.05, above=0, high=1)
    """Of the requests that the canary gets, while it answers; which ones follows from their ids. Both versions are in /metrics."""
    alias_poll_s: float = limited(30, above=0)
    """`llada serve` looks so often where the aliases of models:/NAME@ALIAS point; a new version takes over when it answers."""
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
    variable of its environment. None: everybody who reaches the port. A file is read again every few seconds: keys come and
    go without a restart, and one that is damaged changes nothing but the log."""
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
        names = [self.name]
        for model in self.more_models:
            name, separator, url = model.partition("=")
            require(
                bool(separator and url) and _NAME.fullmatch(name) is not None,
                f"serve: more_models must be NAME=URL, not {model!r}",
            )
            require(name not in names, f"serve: two models are called {name!r}")
            names.append(name)
        require(
            self.models_per_replica is None or bool(self.more_models),
            "serve: models_per_replica means nothing without more_models",
        )
        require(
            self.canary is not None or self.canary_share == 0.05,
            "serve: canary_share means nothing without canary",
        )
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
        return self.model_id or registered_name(self.model) or last_part(self.model)

    @property
    def further_models(self) -> dict[str, str]:
        """{name in requests: URL} of `more_models`."""
        split = (model.partition("=") for model in self.more_models)
        return {name: url for name, _, url in split}

    @property
    def models(self) -> dict[str, str]:
        """{name of a deployment: URL of what it serves}, as if none were shared; the first is the one that has no other name."""
        more = {f"{DENOISER}-{name}": url for name, url in self.further_models.items()}
        canary = {} if self.canary is None else {CANARY: self.canary}
        return {DENOISER: self.model} | canary | more

    @property
    def deployments(self) -> list[str]:
        """Names of those that there are."""
        if self.models_per_replica is None:
            return [*self.models]
        return [name for name in (DENOISER, CANARY) if name in self.models]


def parse_args(values: dict[str, Any]) -> ServeArgs:
    """ServeArgs from a YAML mapping. Raises UserError for an unknown key (naming the nearest) or a wrong type."""
    defaults = {"sampling": dataclasses.asdict(default_sampling())}
    return from_dict(ServeArgs, merge_settings(defaults, values))


def with_folders(args: ServeArgs, tracking_uri: str | None = None) -> ServeArgs:
    """Models of MLflow's registry as the folders that they are now, the first under its registered name. Raises UserError."""
    uri = tracking_uri or default_tracking_uri("endpoint")  # there is no output that it would stand beside
    found = {url: model_folder(url, uri) for url in args.models.values()}
    if all(url == folder for url, folder in found.items()):
        return args
    return with_models(dataclasses.replace(args, model_id=args.name), found.__getitem__)


def with_models(args: ServeArgs, place: Callable[[str], str]) -> ServeArgs:
    """Each model's URL replaced by where `place` says that it is."""
    more = [model.partition("=") for model in args.more_models]
    return dataclasses.replace(
        args,
        model=place(args.model),
        canary=args.canary and place(args.canary),
        more_models=tuple(f"{name}={place(url)}" for name, _, url in more),
    )


def last_part(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]
