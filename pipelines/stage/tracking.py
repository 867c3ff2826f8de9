"""MLflow: one experiment, one run per stage, with parameters, metrics, system metrics, artifacts and lineage.

The run's id is kept in the stage's folder (tracking.json): a stage that goes on continues its run, and one that is
already finished, or refuses its input, makes none. Tracking can fail, training cannot. Calls go into a queue that a
background thread hands to MLflow; when the server is away they wait there, and whatever could not be delivered is
written at the end to `tracking-undelivered.jsonl` in the stage's folder. Nothing here raises and nothing here blocks a
training step.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llada.files import is_store_error, join, local_path, read_bytes, write_bytes
from llada.settings import flatten_settings

EXPERIMENT = "llada"
RUN_FILE = "tracking.json"
# MLflow's limits (mlflow/utils/validation.py).
PARAM_VALUE_CHARS = 6000
PARAMS_PER_BATCH = 100
METRICS_PER_BATCH = 1000
BUFFERED_CALLS = 100_000
RETRY_S = 2.0
CLOSE_TIMEOUT_S = 20.0

log = logging.getLogger(__name__)


def default_tracking_uri(output: str) -> str:
    """$MLFLOW_TRACKING_URI, or an sqlite file beside the stage's output (in the working directory for remote ones)."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    local = local_path(output)
    folder = Path(local).absolute().parent if local else Path.cwd()
    return f"sqlite:///{folder / 'mlflow.db'}"


def tracking_places(uri: str) -> list[str]:
    """The files and folders in which MLflow keeps runs on this machine."""
    if not uri.startswith("sqlite:///"):
        return []
    database = Path(uri.removeprefix("sqlite:///"))
    return [str(database), str(database.parent / "mlartifacts")]


class Tracker:
    """One MLflow run, started by the first call. All calls return at once."""

    def __init__(self, uri: str, stage: str, output: str) -> None:
        self.uri, self.stage, self.output = uri, stage, output
        self.run_id: str | None = None
        self._calls: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(BUFFERED_CALLS)
        self._undelivered: list[tuple[str, dict[str, Any]]] = []
        self._warned_of: set[str] = set()
        self._started = threading.Event()
        self._system_metrics: Any = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters, nested ones as dotted names."""
        values = {name: str(value) for name, value in flatten_settings(params).items()}
        self._put("params", values=values)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        self._put("metrics", values=numbers, step=step or 0, timestamp=int(time.time() * 1000))

    def log_artifact(self, url: str | Path) -> None:
        """A file at any URL."""
        self._put("artifact", url=str(url))

    def log_input(self, url: str, *, context: str, manifest: Mapping[str, object] | None = None) -> None:
        """A folder the stage reads, as an MLflow dataset; its digest is the manifest's config hash."""
        digest = str((manifest or {}).get("config_hash") or "unknown")[:36]
        producer = str((manifest or {}).get("mlflow_run_id") or "")
        self._put("input", url=url, context=context, digest=digest, producer=producer)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._put("tags", values=dict(tags))

    def close(self, status: str = "FINISHED") -> None:
        """End the run; waits briefly for the queue, then writes what is left to the stage's folder."""
        if not self._thread.ident:
            return
        self._put("end", status=status)
        self._closing.set()
        self._calls.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        left = list(self._undelivered)
        while not self._calls.empty():
            if (call := self._calls.get_nowait()) is not None:
                left.append(call)
        if left:
            target = join(self.output, "tracking-undelivered.jsonl")
            try:
                lines = [
                    json.dumps({"call": name, **values}, default=str, skipkeys=True) + "\n"
                    for name, values in left
                ]
                write_bytes(target, "".join(lines).encode())
                log.warning("MLflow at %s did not take %d calls; they are in %s", self.uri, len(left), target)
            except Exception as error:  # the stage has succeeded; its bookkeeping must not fail it
                log.warning(
                    "MLflow at %s did not take %d calls, and %s: %s", self.uri, len(left), target, error
                )

    def wait_started(self, timeout_s: float = 10.0) -> str | None:
        """The run id, once MLflow has given one; None if it does not answer in time."""
        self._started.wait(timeout_s)
        return self.run_id

    def _put(self, name: str, **values: Any) -> None:
        if not self._thread.ident:
            self._thread.start()
        try:
            self._calls.put_nowait((name, values))
        except queue.Full:
            log.warning("MLflow buffer full: dropping one %s call", name)

    def _deliver(self) -> None:
        """The background thread: start the run, then hand over calls in order, each again while the server is away."""
        client = None
        while True:
            call = self._calls.get()
            if call is None:
                return
            while True:
                try:
                    if client is None:
                        client = self._start()
                    self._handle(client, *call)
                    break
                except Exception as error:
                    if self._closing.is_set() or not _may_pass(error):
                        self._give_up(call, error)
                        break
                    log.debug("MLflow call %s failed: %s", call[0], error)
                    time.sleep(RETRY_S)

    def _give_up(self, call: tuple[str, dict[str, Any]], error: Exception) -> None:
        """Keep a call for the file of the undelivered; each kind of failure is warned of once."""
        self._undelivered.append(call)
        reason = f"MLflow call {call[0]} failed: {type(error).__name__}: {error}"
        is_known = _may_pass(error) or _is_refused(error) or reason in self._warned_of
        log.log(logging.DEBUG if is_known else logging.WARNING, reason)
        self._warned_of.add(reason)

    def _start(self) -> Any:
        # A dead server must not hold the thread for MLflow's default of seven retries with back-off.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        import mlflow

        logging.getLogger("alembic").setLevel(logging.ERROR)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        client = mlflow.MlflowClient(tracking_uri=self.uri)
        if self.run_id is None:
            self.run_id = self._earlier_run(client)
        if self.run_id is None:
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                location = None
                if self.uri.startswith("sqlite:///"):
                    location = Path(tracking_places(self.uri)[1]).as_uri()
                experiment_id = client.create_experiment(EXPERIMENT, artifact_location=location)
            else:
                experiment_id = experiment.experiment_id
            tags = {"stage": self.stage, "output": self.output}
            run = client.create_run(experiment_id, run_name=self.stage, tags=tags)
            self.run_id = run.info.run_id
        else:
            client.update_run(self.run_id, status="RUNNING")
        record = json.dumps({"uri": self.uri, "run_id": self.run_id}) + "\n"
        write_bytes(join(self.output, RUN_FILE), record.encode())
        self._system_metrics = _system_metrics(client, self.run_id)
        self._started.set()
        return client

    def _earlier_run(self, client: Any) -> str | None:
        """The run that an earlier attempt at this output has begun on this server, if it still has it."""
        try:
            record = json.loads(read_bytes(join(self.output, RUN_FILE)))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("uri") != self.uri:
            return None
        try:
            info = client.get_run(record["run_id"]).info
            return info.run_id if info.lifecycle_stage == "active" else None
        except Exception as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _handle(self, client: Any, name: str, values: dict[str, Any]) -> None:
        from mlflow.entities import Metric, Param

        if name == "params":
            params = [Param(k, v[:PARAM_VALUE_CHARS]) for k, v in values["values"].items()]
            for start in range(0, len(params), PARAMS_PER_BATCH):
                client.log_batch(self.run_id, params=params[start : start + PARAMS_PER_BATCH])
        elif name == "metrics":
            metrics = [Metric(k, v, values["timestamp"], values["step"]) for k, v in values["values"].items()]
            for start in range(0, len(metrics), METRICS_PER_BATCH):
                client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_BATCH])
        elif name == "artifact":
            self._log_artifact(client, values["url"])
        elif name == "tags":
            for key, value in values["values"].items():
                client.set_tag(self.run_id, key, value)
        elif name == "input":
            from mlflow.entities import Dataset, DatasetInput, InputTag

            source = json.dumps({"uri": values["url"]})
            dataset = Dataset(values["url"].rstrip("/")[-500:], values["digest"], "code", source)
            tags = [InputTag("mlflow.data.context", values["context"])]
            client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags)])
            if values["producer"]:
                client.set_tag(self.run_id, f"input.{values['context']}.run_id", values["producer"])
        elif name == "end":
            if self._system_metrics:
                self._system_metrics.finish()
            client.set_terminated(self.run_id, status=values["status"])

    def _log_artifact(self, client: Any, url: str) -> None:
        if path := local_path(url):
            client.log_artifact(self.run_id, path)
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / url.rsplit("/", 1)[-1]
            copy.write_bytes(read_bytes(url))
            client.log_artifact(self.run_id, str(copy))


def _system_metrics(client: Any, run_id: str) -> Any:
    """MLflow's own monitor of this node's CPU, memory, disk, network and GPUs; None where it cannot run."""
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, sampling_interval=5, tracking_uri=client.tracking_uri)
        monitor.start()
        return monitor
    except Exception as error:
        log.debug("no system metrics: %s", error)
        return None


def _is_refused(error: Exception) -> bool:
    """MLflow refused the content itself (say, a parameter logged twice with two values): trying again is no use."""
    code = getattr(error, "error_code", "")
    return code in ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST")


def _may_pass(error: Exception) -> bool:
    """The server, its database or the store of its artifacts failed. All else is a fault of ours, which would only fail
    again; on a database MLflow wraps those too."""
    ours = (TypeError, AttributeError, LookupError, NameError, AssertionError, FileNotFoundError)
    if _is_refused(error) or isinstance(error.__cause__ or error, ours):
        return False
    of_server = type(error).__module__.split(".")[0] in ("mlflow", "sqlalchemy")
    return of_server or is_store_error(error)


@contextmanager
def tracked(stage: str, output: str, *, uri: str | None = None) -> Iterator[Tracker]:
    """A tracker for a `with` block: FINISHED at its end, FAILED when it raises."""
    tracker = Tracker(uri or default_tracking_uri(output), stage, output)
    try:
        yield tracker
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close()
