"""MLflow: one experiment, one run per stage, with parameters, metrics, system metrics, artifacts, models and lineage.

The run's id is kept in the stage's folder (tracking.json): a stage that goes on continues its run, and one that is
already finished, or refuses its input, makes none. Tracking can fail, training cannot. Calls go into a queue that a
background thread hands to MLflow (delivery.py); when the server is away they wait there, and whatever could not be
delivered is written at the end to `tracking-undelivered.jsonl` in the stage's folder, which the next attempt or
`llada track` delivers. Nothing here raises and nothing here blocks a training step.
"""

from __future__ import annotations

import getpass
import logging
import os
import queue
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llada.files import absolute, exists, join, local_path
from llada.settings import flatten_settings
from llada.store_errors import may_pass
from pipelines.stage.artifact import UNDELIVERED_FILE, git_commit, link_run
from pipelines.stage.cluster import submission_id
from pipelines.stage.delivery import (
    CALLS,
    JOB_TAG,
    Call,
    Delivery,
    database_path,
    put_aside_undelivered,
    read_undelivered,
    write_undelivered,
)

BUFFERED_CALLS = 100_000
RETRY_S = 2.0
# MLflow itself takes this long to start on a busy machine; a server that refuses is given up at once.
CLOSE_TIMEOUT_S = 90.0
START_TIMEOUT_S = 60.0
# MLflow's codes of what it will answer the next time too.
_FINAL = (
    "CUSTOMER_UNAUTHORIZED",
    "ENDPOINT_NOT_FOUND",
    "FEATURE_DISABLED",
    "NOT_IMPLEMENTED",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
)

log = logging.getLogger(__name__)


def default_tracking_uri(output: str) -> str:
    """$MLFLOW_TRACKING_URI, or an sqlite file beside the stage's output (in the working directory for remote ones)."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    local = local_path(output)
    folder = Path(local).absolute().parent if local else Path.cwd()
    return f"sqlite:///{folder / 'mlflow.db'}"


class Tracker:
    """One MLflow run, started by the first call. All calls return at once.

    Args:
        preset: what the settings are called, for the names of the run and of the model.
    """

    def __init__(self, uri: str, stage: str, output: str, *, preset: str | None = None) -> None:
        self.uri, self.stage, self.output, self.preset = uri, stage, absolute(output), preset
        self._delivery = Delivery(uri, self.output)
        self._calls: queue.Queue[Call | None] = queue.Queue(BUFFERED_CALLS)
        self._earlier: list[Call] = []
        self._current: Call | None = None
        self._undelivered: list[Call] = []
        self._warned_of: set[str] = set()
        self._tried = threading.Event()
        self._system_metrics: Any = None
        self._closing = threading.Event()
        self._begin: Call = ("start", {"name": self._run_name(), "tags": self._run_tags()})
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)

    @property
    def run_id(self) -> str | None:
        """Once MLflow has given one."""
        return self._delivery.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters, nested ones as dotted names; those that are None are not set, and left out."""
        flat = flatten_settings(params)
        self._put("params", values={name: str(value) for name, value in flat.items() if value is not None})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Metrics of a step; MLflow is told each step of them once, however often it is logged."""
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        self._put("metrics", values=numbers, step=step or 0, timestamp=_now_ms())

    def log_record(self) -> None:
        """What the record of a training folder (metrics.py) has, and the run was not told yet."""
        self._put("record", output=self.output, timestamp=_now_ms())

    def redo_metrics(self, after: int) -> None:
        """The metrics of the steps after this one are going to be logged again, and are others then."""
        self._put("redo", after=after)

    def log_artifact(self, url: str | Path) -> None:
        """A file at any URL."""
        self._put("artifact", url=absolute(str(url)))

    def log_text(self, name: str, text: str) -> None:
        """A text as the file `name` among the run's artifacts."""
        self._put("text", name=name, text=text)

    def log_input(self, url: str, *, context: str, manifest: Mapping[str, object] | None = None) -> None:
        """A folder the stage reads, as an MLflow dataset; its digest is the manifest's config hash."""
        digest = str((manifest or {}).get("config_hash") or "unknown")[:36]
        producer = str((manifest or {}).get("mlflow_run_id") or "")
        if isinstance(url, str):  # else a fault of ours, which is told where MLflow finds it
            url = absolute(url)
        self._put("input", url=url, context=context, digest=digest, producer=producer)

    def log_model(self, url: str, *, step: int) -> None:
        """A checkpoint folder as the run's model, and as the newest version of the registered model
        `<preset>-<stage>`: models:/<preset>-<stage>@<alias> is then a place that every --model takes."""
        self._put("model", url=url, name=f"{self.preset or 'llada'}-{self.stage}", step=step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._put("tags", values=dict(tags))

    def deliver_left(self) -> None:
        """Begin to deliver what an earlier attempt could not."""
        if not self._thread.ident:
            self._thread.start()

    def close(self, status: str = "FINISHED") -> None:
        """End the run; waits a while for the queue, then writes what is left to the stage's folder."""
        if not self._thread.ident:
            return
        self._put("end", status=status)
        self._closing.set()
        self._calls.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        left = [*self._undelivered, *([self._current] if self._current else []), *self._earlier]
        while not self._calls.empty():
            if (call := self._calls.get_nowait()) is not None:
                left.append(call)
        target = join(self.output, UNDELIVERED_FILE)
        try:  # the stage has succeeded; its bookkeeping must not fail it
            if self.run_id:
                link_run(self.output, self.run_id)
            write_undelivered(self.output, None if self.run_id else self._begin, left)
        except Exception as error:
            log.warning("MLflow at %s did not take %d calls, and %s: %s", self.uri, len(left), target, error)
        else:
            if left:
                log.warning(
                    "MLflow at %s did not take %d calls; `llada track %s` delivers them from %s",
                    self.uri,
                    len(left),
                    self.output,
                    target,
                )

    def wait_started(self, timeout_s: float = START_TIMEOUT_S) -> str | None:
        """The run id, once MLflow has given one; None if it does not answer in time, or cannot be used."""
        if self._thread.ident:
            self._tried.wait(timeout_s)
        return self.run_id

    def _run_name(self) -> str:
        """What tells it apart in a list of runs: "pretrain tiny first-try 2026-11-26 03:50"."""
        folder = self.output.rstrip("/").rsplit("/", 1)[-1]
        return " ".join(filter(None, [self.stage, self.preset, folder, time.strftime("%Y-%m-%d %H:%M")]))

    def _run_tags(self) -> dict[str, str]:
        tags = {"stage": self.stage, "output": self.output, "mlflow.source.name": shlex.join(sys.argv)}
        with suppress(Exception):  # no such user in a container
            tags["mlflow.user"] = getpass.getuser()
        if self.preset:
            tags["preset"] = self.preset
        if job := submission_id():
            tags[JOB_TAG] = job
        if commit := git_commit():
            tags |= {"git_commit": commit, "mlflow.source.git.commit": commit}
        return tags

    def _put(self, call: str, /, **values: Any) -> None:
        self.deliver_left()
        try:
            self._calls.put_nowait((call, values))
        except queue.Full:
            reason = "MLflow is not fast enough, or away, and the buffer is full: calls are dropped"
            if reason not in self._warned_of:
                log.warning("%s", reason)
            self._warned_of.add(reason)

    def _deliver(self) -> None:
        """The background thread: start the run, then hand over calls in order, each again while the server is away."""
        try:
            earlier = read_undelivered(self.output)[1]
            # Begun and ended is the run by this attempt.
            self._earlier = [call for call in earlier if call[0] in CALLS and call[0] != "end"]
        except Exception as error:  # must not cost this attempt its run
            log.warning("%s; it is put aside", error)
            with suppress(Exception):
                put_aside_undelivered(self.output)
        while True:
            call = self._earlier.pop(0) if self._earlier else self._calls.get()
            if call is None:
                return
            self._current = call
            while True:
                try:
                    if self._delivery.client is None:
                        self._start()
                    self._hand_over(call)
                    break
                except Exception as error:
                    self._tried.set()
                    if self._closing.is_set() or not _may_pass(error):
                        self._give_up(call, error)
                        break
                    self._warn_once(error, "it is tried again")
                    time.sleep(RETRY_S)
            self._current = None

    def _hand_over(self, call: Call) -> None:
        if call[0] == "end" and self._system_metrics:
            self._system_metrics.finish()
        self._delivery(call)

    def _start(self) -> None:
        self._delivery.open(**self._begin[1])
        assert self.run_id is not None
        self._system_metrics = _system_metrics(self._delivery.client, self.run_id)
        self._tried.set()

    def _give_up(self, call: Call, error: Exception) -> None:
        """Keep a call for the file of the undelivered; each kind of failure is told once, a fault of ours as an error."""
        self._undelivered.append(call)
        if self._delivery.client is None:
            self._warn_once(error, f"what it misses is kept in {join(self.output, UNDELIVERED_FILE)}")
            return
        reason = f"MLflow call {call[0]} failed: {type(error).__name__}: {error}"
        is_known = _may_pass(error) or _is_refused(error) or reason in self._warned_of
        log.log(logging.DEBUG if is_known else logging.ERROR, reason)
        self._warned_of.add(reason)

    def _warn_once(self, error: Exception, consequence: str) -> None:
        reason = str(error).splitlines()[0] if str(error) else ""
        remedy = ""
        if self._delivery.client is None and database_path(self.uri) is not None:
            remedy = f" (a database of another version, or half made: `mlflow db upgrade {self.uri}`, or delete it)"
        if reason not in self._warned_of:
            self._warned_of.add(reason)
            log.warning(
                "MLflow at %s: %s: %s%s; %s", self.uri, type(error).__name__, reason, remedy, consequence
            )


def _now_ms() -> int:
    return int(time.time() * 1000)


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
    """The server, its database or the store of its artifacts failed, and may not the next time. All else is a fault of
    ours, which would only fail again; on a database MLflow wraps those too."""
    ours = (TypeError, AttributeError, LookupError, NameError, AssertionError, FileNotFoundError)
    if _is_refused(error) or isinstance(error.__cause__ or error.__context__ or error, ours):
        return False
    if getattr(error, "error_code", "") in _FINAL or "out-of-date database schema" in str(error):
        return False
    of_server = type(error).__module__.split(".")[0] in ("mlflow", "sqlalchemy")
    return of_server or may_pass(error)


def _has_undelivered(output: str) -> bool:
    with suppress(Exception):
        return exists(join(output, UNDELIVERED_FILE))
    return False


@contextmanager
def tracked(
    stage: str, output: str, *, uri: str | None = None, preset: str | None = None
) -> Iterator[Tracker]:
    """A tracker for a `with` block: FINISHED at its end, KILLED when it is interrupted, FAILED when it raises."""
    tracker = Tracker(uri or default_tracking_uri(output), stage, output, preset=preset)
    try:
        if _has_undelivered(tracker.output):
            tracker.deliver_left()
        yield tracker
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.close()
