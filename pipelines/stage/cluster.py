"""Where a stage runs: `ClusterConfig`, read from ray_configs/<name>.yaml, and `connect`, which joins or starts Ray.

A cluster file holds resources only. No setting here may change a result, so none is part of a configuration hash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llada.errors import UserError
from llada.settings import check_limits, from_dict, limited, load_yaml, require
from pipelines.stage.interruption import handlers_kept
from pipelines.stage.own_ray import OWN_RAY, end_process, is_own_ray, own_node, spare_start

_CONNECT_TIMEOUT_S = 5.0
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Silences a FutureWarning about GPU variables on CPU tasks.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
# Ray adds 15 to the niceness of its workers: with other work on the machine they would hardly get a turn.
_NICENESS = {"RAY_worker_niceness": "0"}
# Where Ray tells the process of a job what it was submitted with.
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_until_exit = False

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Resources. Counts of CPUs and GPUs may be fractions, as in Ray."""

    address: str | None = None
    """None starts a Ray of its own in this process; "auto", "host:port" and "ray://host:port" join a running one."""
    num_cpus: int | None = limited(None, low=1)
    """CPUs of a Ray started here; None takes all."""
    object_store_bytes: int | None = None
    """Shared memory of a Ray started here; None leaves it to Ray."""
    runtime_env: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Ray's runtime environment for every task: env_vars, working_dir, pip ... In a job, what it was submitted with stands."""

    num_workers: int | tuple[int, int] = limited(1, low=1)
    """Training workers; with GPUs, one for each GPU. [least, most]: as many of them as there is room for. A training goes on
    with fewer when a machine is lost, and with more when one comes."""
    cpus_per_worker: float = limited(1, low=0)
    gpus_per_worker: float = limited(0, low=0)
    resize_every_s: float = limited(60, above=0)
    """Between two looks whether there is room for more training workers."""
    max_failures: int = limited(3, low=0)
    """So often in a row, without a new checkpoint in between, training workers may fail; then the run ends."""
    store_patience_s: float = limited(3600, low=0)
    """So long in all, without a new checkpoint in between, a training whose store is away waits before it tries again: at first a
    few seconds, then up to a minute at a time. These attempts are no failures. Then the run ends."""
    max_preemptions: int | None = limited(None, low=0)
    """So often machines may be taken away from a training; None: any number of times."""
    hang_timeout_s: float = limited(60, above=0)
    """A training step that takes so long, and ten times what one usually takes, hangs: its workers are started again. One that
    waits for a store has an hour."""

    data_workers: int | None = limited(None, low=1)
    """Data preparation workers at the most; None uses every free CPU."""
    cpus_per_data_worker: float = limited(1, above=0)
    memory_bytes_per_data_worker: int | None = None
    """Memory that Ray reserves for each data worker; None reserves none."""

    min_replicas: int = limited(1, low=0)
    """Serving (and batch generation) copies of the model at rest ..."""
    max_replicas: int = limited(1, low=1)
    """... and under load."""
    cpus_per_replica: float = limited(1, low=0)
    gpus_per_replica: float = limited(0, low=0)

    def __post_init__(self) -> None:
        check_limits(self, "cluster")
        low, high = self.min_workers, self.max_workers
        require(low <= high, f"cluster: num_workers are [least, most], not [{low}, {high}]")

    @property
    def min_workers(self) -> int:
        """With fewer a training waits."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """More it does not take."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


def load_cluster(path: str | Path | None) -> ClusterConfig:
    """The cluster file at `path`; None: the defaults. Raises UserError for an unknown key (naming the nearest) or a
    wrong type."""
    if path is None:
        return ClusterConfig()
    values = load_yaml(path, "cluster file")
    return from_dict(ClusterConfig, values or {}, f"{path}: ")


@contextlib.contextmanager
def connect(cluster: ClusterConfig, log_dir: str | Path) -> Iterator[Path]:
    """Join or start Ray for a `with` block; yields the file that receives what Ray and Ray Data have to say.

    A Ray that this process has joined before is used as it is and left running; one that is started here ends with the
    block, or within `until_exit` with the process. Raises UserError within seconds when there is no cluster at the
    address. Output of remote tasks stays in Ray's own session folder.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if cluster.address is None:
        for name, value in {**OWN_RAY, **_NICENESS}.items():
            os.environ.setdefault(name, value)
    import ray
    import ray.data  # now, because importing it sets up its loggers, which _logs_to replaces

    log_path = Path(log_dir) / "ray.log"
    with _logs_to(log_path) as handler:
        joined = not ray.is_initialized()
        try:
            if joined:
                _start(cluster)
            logging.getLogger("ray").handlers = [handler]  # ray.init has taken it away
            ray.data.DataContext.get_current().enable_progress_bars = False  # ours is the one that people see
            yield log_path
        finally:
            if joined and not (_until_exit and cluster.address is None):
                _leave()


@contextlib.contextmanager
def until_exit() -> Iterator[None]:
    """For a `with` block that is the last of its process, and ends it with the code of its SystemExit, or 0.

    A Ray that `connect` starts in the block is ended with the process, and without ray.shutdown: where its node has died,
    Ray's core worker ends this process in there with code 1, past every handler. Without such a Ray, the process ends as
    any other.
    """
    global _until_exit
    _until_exit = True
    code: Any = 0
    try:
        yield
    except SystemExit as ended:
        code = ended.code
    finally:
        _until_exit = False
    if (node := own_node()) is not None:
        end_process(node, code if isinstance(code, int) else int(code is not None))
    if code:
        raise SystemExit(code)


def require_room(what: str, number: int, cpus: float, gpus: float = 0) -> None:
    """Say at once what Ray would wait for without a word: a cluster that has no room for so many at a time. `cpus` and `gpus`
    are those of each, which has to fit on one machine.

    Raises UserError when there never will be room: in a Ray that this process has started no machine will join it, and an
    autoscaler knows how far it goes. Elsewhere machines may join, and that they are waited for is a warning.
    """
    import ray
    from ray._private.state import state  # Ray Train asks there too; Ray has no public name for it

    need = {kind: each for kind, each in (("CPU", cpus), ("GPU", gpus)) if each}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not need or sum(_fitting(node, need) for node in nodes) >= number:
        return
    asked = f"{number} × {' and '.join(f'{each:g} {kind}' for kind, each in need.items())} ({what})"
    there = "; ".join(
        f"{count} × {text}" if count > 1 else text for text, count in Counter(map(_described, nodes)).items()
    )
    remedy = "ask for less, or give the cluster file of a larger Ray"
    if is_own_ray():
        raise UserError(f"there is no room for {asked}: this Ray has {there}; {remedy}")
    most = state.get_max_resources_from_cluster_config()
    if most and any(number * each > most.get(kind, 0) for kind, each in need.items()):
        raise UserError(
            f"there is no room for {asked}: the cluster has {there}, and its autoscaler goes up to {_described(most)}; {remedy}"
        )
    log.warning("no room yet for %s: the cluster has %s; machines are waited for", asked, there)


def most_cpus() -> float:
    """CPUs of the Ray that we are connected to, with those that its autoscaler may add."""
    import ray
    from ray._private.state import state  # as above

    added = state.get_max_resources_from_cluster_config() or {}
    return max(ray.cluster_resources().get("CPU", 0), added.get("CPU", 0))


def _fitting(node: Mapping[str, float], need: Mapping[str, float]) -> float:
    """How many of those that need so much fit on a node."""
    return min(node.get(kind, 0) // each for kind, each in need.items())


def _described(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))


def _leave() -> None:
    """Disconnect from Ray, and end one that was started here. What goes wrong then has nothing to do with our work."""
    import ray

    try:
        ray.shutdown()
    except Exception:
        logging.getLogger("ray").warning("Ray did not end well", exc_info=True)


def _start(cluster: ClusterConfig) -> None:
    """Join or start Ray; signals are handled as they were before, though Ray sets a handler of its own."""
    try:
        with handlers_kept():
            _init(cluster)
    except SystemExit:  # Ray's handler of SIGTERM
        signal.raise_signal(signal.SIGTERM)
        raise


def _init(cluster: ClusterConfig) -> None:
    import ray

    # configure_logging=False: ray.init would attach its own handlers again.
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if cluster.address is None:
        # Workers inherit the environment, and must find this source tree even when it is not installed.
        paths = [
            str(Path(__file__).resolve().parents[2]),
            *os.environ.get("PYTHONPATH", "").split(os.pathsep),
        ]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
        options |= {"num_cpus": cluster.num_cpus, "object_store_memory": cluster.object_store_bytes}
        if cluster.runtime_env:
            options["runtime_env"] = cluster.runtime_env
        try:
            with spare_start():
                ray.init(address="local", include_dashboard=False, **options)
        except Exception as error:
            if not _is_about_starting(error):
                raise
            raise UserError(
                f"Ray did not start on this machine: {_first_line(error)}; it may be too busy or out of memory: "
                "run the same command again (Ray's own logs: /tmp/ray/session_latest/logs)"
            ) from error
        return
    remedy = (
        "start it (ray start --head), correct `address` in the cluster file, or use ray_configs/local.yaml"
    )
    host, separator, port = cluster.address.removeprefix("ray://").rpartition(":")
    if separator:  # ask the port first: Ray itself keeps trying for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        except (OSError, ValueError) as error:
            raise UserError(f"no Ray cluster at {cluster.address} ({error}); {remedy}") from None
    options["runtime_env"] = _beside_the_jobs(
        {**cluster.runtime_env, "env_vars": {**_NICENESS, **cluster.runtime_env.get("env_vars", {})}}
    )
    try:
        ray.init(address=cluster.address, **options)
    except Exception as error:
        if not _is_about_starting(error):
            raise
        raise UserError(
            f"cannot join the Ray cluster at {cluster.address!r}: {_first_line(error)}; {remedy}"
        ) from error


def _beside_the_jobs(environment: dict[str, Any]) -> dict[str, Any]:
    """Of a runtime environment, what the job that we are has not got yet: Ray refuses to be told twice."""
    job = _job_config().get("runtime_env") or {}
    env_vars = {
        name: value for name, value in environment["env_vars"].items() if name not in job.get("env_vars", {})
    }
    return {
        **{name: value for name, value in environment.items() if name not in job},
        "env_vars": env_vars,
    }


def submission_id() -> str | None:
    """The name of the Ray job whose process this is; None where it is none."""
    return (_job_config().get("metadata") or {}).get("job_submission_id")


def _job_config() -> dict[str, Any]:
    return json.loads(os.environ.get(_JOB_CONFIG, "{}"))


def _is_about_starting(error: Exception) -> bool:
    """Whether Ray says that it cannot start or be joined; some of that it raises as a bare Exception."""
    from ray.exceptions import RayError

    return isinstance(error, OSError | RuntimeError | ValueError | RayError) or type(error) is Exception


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def _logs_to(path: Path) -> Iterator[logging.Handler]:
    """Send the records of every `ray` logger of this process to `path` and nowhere else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    names = [name for name in logging.root.manager.loggerDict if name == "ray" or name.startswith("ray.")]
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in names}
    for name in names:
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True
    logging.getLogger("ray").handlers, logging.getLogger("ray").propagate = [handler], False
    try:
        yield handler
    finally:
        for name, (handlers, propagate) in before.items():
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate
        handler.close()
