"""Where a stage runs: `ClusterConfig`, read from ray_configs/<name>.yaml, and `connect`, which joins or starts Ray.

A cluster file holds resources only. No setting here may change a result, so none is part of a configuration hash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import os
import socket
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipelines.stage.artifact import StageError

_CONNECT_TIMEOUT_S = 5.0
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a FutureWarning about GPU variables on CPU tasks
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Resources. Counts of CPUs and GPUs may be fractions, as in Ray."""

    address: str | None = None
    """None starts a Ray of its own in this process; "auto", "host:port" and "ray://host:port" join a running one."""
    num_cpus: int | None = None
    """CPUs of a Ray started here; None takes all."""
    object_store_bytes: int | None = None
    """Shared memory of a Ray started here; None leaves it to Ray."""
    runtime_env: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Ray's runtime environment for every task: env_vars, working_dir, pip ..."""

    num_workers: int = 1
    """Training workers; with GPUs, one for each GPU."""
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0

    data_workers: int | None = None
    """Data preparation workers at the most; None uses every free CPU."""
    cpus_per_data_worker: float = 1
    memory_bytes_per_data_worker: int | None = None
    """Memory that Ray reserves for each data worker; None reserves none."""

    min_replicas: int = 1
    """Serving (and batch generation) copies of the model at rest ..."""
    max_replicas: int = 1
    """... and under load."""
    cpus_per_replica: float = 1
    gpus_per_replica: float = 0


def load_cluster(path: str | Path) -> ClusterConfig:
    """The cluster file at `path`. Raises StageError for an unknown key (naming the nearest) or a wrong type."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StageError(f"cannot read the cluster file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise StageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict | types.NoneType):
        raise StageError(f"{path} must hold 'key: value' lines")
    values = loaded or {}
    kinds = typing.get_type_hints(ClusterConfig)
    for key, value in values.items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(kinds)}"
            raise StageError(f"{path}: unknown key {key!r}; {hint}")
        if not _matches(value, kinds[key]):
            raise StageError(f"{path}: {key} must be {_describe(kinds[key])}, not {value!r}")
    return ClusterConfig(**values)


def _matches(value: Any, kind: Any) -> bool:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    plain = [typing.get_origin(option) or option for option in options]
    if isinstance(value, bool):
        return bool in plain
    return isinstance(value, tuple(plain)) or (float in plain and isinstance(value, int))


def _describe(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind)).replace("None", "null")


@contextlib.contextmanager
def connect(cluster: ClusterConfig, log_dir: str | Path) -> Iterator[Path]:
    """Join or start Ray for a `with` block; yields the file that receives what Ray and Ray Data have to say.

    A Ray that this process has joined before is used as it is and left running. Raises StageError within seconds when
    there is no cluster at the address. Output of remote tasks stays in Ray's own session folder.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if cluster.address is None:
        os.environ.setdefault(
            "RAY_AUTH_MODE", "disabled"
        )  # nobody but this process talks to a Ray started here
    import ray
    import ray.data  # now, because importing it sets up its loggers, which _logs_to replaces

    log_path = Path(log_dir) / "ray.log"
    with _logs_to(log_path) as handler:
        joined = not ray.is_initialized()
        if joined:
            _start(cluster)
        logging.getLogger("ray").handlers = [handler]  # ray.init has taken it away
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False  # ours is the one that people see
            yield log_path
        finally:
            if joined:
                ray.shutdown()


def _start(cluster: ClusterConfig) -> None:
    import ray

    # configure_logging=False: ray.init would attach its own handlers again.
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if cluster.runtime_env:
        options["runtime_env"] = cluster.runtime_env
    if cluster.address is None:
        # Workers inherit the environment, and must find this source tree even when it is not installed.
        paths = [
            str(Path(__file__).resolve().parents[2]),
            *os.environ.get("PYTHONPATH", "").split(os.pathsep),
        ]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
        options |= {"num_cpus": cluster.num_cpus, "object_store_memory": cluster.object_store_bytes}
        ray.init(address="local", include_dashboard=False, **options)
        return
    remedy = (
        "start it (ray start --head), correct `address` in the cluster file, or use ray_configs/local.yaml"
    )
    host, separator, port = cluster.address.removeprefix("ray://").rpartition(":")
    if separator:  # ask the port first: Ray itself keeps trying for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        except (OSError, ValueError) as error:
            raise StageError(f"no Ray cluster at {cluster.address} ({error}); {remedy}") from None
    try:
        ray.init(address=cluster.address, **options)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StageError(f"cannot join the Ray cluster at {cluster.address!r}: {reason}; {remedy}") from error


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
