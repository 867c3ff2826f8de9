"""What a stage tells MLflow, as MLflow takes it: one run, made or found by the first call, and the calls in their order.

A call is a name and JSON values (`Call`); CALLS says what is done with each. All of them may come twice: what MLflow has
taken already stays as it is. An sqlite file is made whole under another name before it appears, so that stages which
start together share it, and one that ends in the midst of it leaves nothing half made.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llada.errors import UserError
from llada.files import exists, filesystem, join, local_path, read_bytes, write_bytes
from pipelines.stage.artifact import RUN_FILE, UNDELIVERED_FILE
from pipelines.stage.metric_history import MetricHistory

EXPERIMENT = "llada"
# Of a run: the Ray job that works at it, or did last, by its submission id.
JOB_TAG = "ray_job"
_SQLITE = "sqlite:///"
_REGISTRY = "models:/"
# MLflow's limits (mlflow/utils/validation.py).
PARAM_VALUE_CHARS = 6000
KEY_CHARS = 250
_NOT_IN_KEYS = re.compile(r"[^\w.\-: ]")
PARAMS_PER_BATCH = 100

Call = tuple[str, dict[str, Any]]


class Delivery:
    """The run of one output folder on one MLflow server."""

    history: MetricHistory
    """Once it is open."""

    def __init__(self, uri: str, output: str) -> None:
        self.uri, self.output = uri, output
        self.run_id: str | None = None
        self.client: Any = None

    def open(self, name: str, tags: dict[str, str]) -> None:
        """Find the run that an earlier attempt at this output has begun, or make one with this name and these tags."""
        client = open_client(self.uri)
        self.run_id = self.run_id or self._earlier_run(client)
        is_new = self.run_id is None
        if self.run_id is None:
            self.run_id = client.create_run(_experiment(client), run_name=name, tags=tags).info.run_id
        else:
            client.update_run(self.run_id, status="RUNNING")
            if JOB_TAG in tags:
                client.set_tag(self.run_id, JOB_TAG, tags[JOB_TAG])
        record = json.dumps({"uri": self.uri, "run_id": self.run_id}) + "\n"
        write_bytes(join(self.output, RUN_FILE), record.encode())
        self.history = MetricHistory(client, self.run_id, is_new=is_new)
        self.client = client

    def __call__(self, call: Call) -> None:
        """Hand over one call. The run must be open."""
        name, values = call
        CALLS[name](self, values)

    def _earlier_run(self, client: Any) -> str | None:
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


def open_client(uri: str) -> Any:
    """An MLflow client; an sqlite file that is not there yet is made."""
    # A dead server must not hold the thread for MLflow's default of seven retries with back-off.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    import mlflow

    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    if (path := database_path(uri)) is not None:
        _make_database(path)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def open_existing(uri: str) -> Any:
    """An MLflow client of a server, or of an sqlite file that is there. Raises UserError."""
    path = database_path(uri)
    if path is not None and not _has_content(path):
        raise UserError(
            f"there is no MLflow database {path}: set MLFLOW_TRACKING_URI, or give the command --tracking-uri"
        )
    return open_client(uri)


def database_path(uri: str) -> Path | None:
    """The file behind an sqlite URI."""
    return Path(uri.removeprefix(_SQLITE)).absolute() if uri.startswith(_SQLITE) else None


def tracking_places(uri: str) -> list[str]:
    """The files and folders in which MLflow keeps runs on this machine."""
    path = database_path(uri)
    return [] if path is None else [str(path), str(_lock_of(path)), str(_artifacts_of(path))]


def _artifacts_of(database: Path) -> Path:
    return database.parent / "mlartifacts"


def _lock_of(database: Path) -> Path:
    return database.with_name(f".{database.name}.lock")


def _make_database(path: Path) -> None:
    """MLflow itself migrates a new file through its whole history in place, and no two processes may do that at once."""
    if _has_content(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_lock_of(path)):
        if _has_content(path):
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            store = SqlAlchemyStore(f"{_SQLITE}{temporary}", _artifacts_of(path).as_uri())
            store.engine.dispose()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes of this machine; the lock ends with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _experiment(client: Any) -> str:
    """The id of our experiment, made where it is missing."""
    from mlflow.exceptions import MlflowException

    location = None
    if (path := database_path(client.tracking_uri)) is not None:
        location = _artifacts_of(path).as_uri()
    if client.get_experiment_by_name(EXPERIMENT) is None:
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=location)
        except MlflowException as error:  # another stage was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    return client.get_experiment_by_name(EXPERIMENT).experiment_id


# --- Calls ------------------------------------------------------------------------------------------------------------


def _params(run: Delivery, values: dict[str, Any]) -> None:
    from mlflow.entities import Param

    # A source, say, may be called as no key may.
    named = {_NOT_IN_KEYS.sub("_", key)[:KEY_CHARS]: value for key, value in values["values"].items()}
    params = [Param(key, value[:PARAM_VALUE_CHARS]) for key, value in named.items()]
    for start in range(0, len(params), PARAMS_PER_BATCH):
        run.client.log_batch(run.run_id, params=params[start : start + PARAMS_PER_BATCH])


def _metrics(run: Delivery, values: dict[str, Any]) -> None:
    run.history.log(values["values"], values["step"], values["timestamp"])


def _record(run: Delivery, values: dict[str, Any]) -> None:
    run.history.log_record(values["output"], values["timestamp"])


def _redo(run: Delivery, values: dict[str, Any]) -> None:
    run.history.redo(values["after"])


def _artifact(run: Delivery, values: dict[str, Any]) -> None:
    url = values["url"]
    if path := local_path(url):
        run.client.log_artifact(run.run_id, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / url.rsplit("/", 1)[-1]
        copy.write_bytes(read_bytes(url))
        run.client.log_artifact(run.run_id, str(copy))


def _text(run: Delivery, values: dict[str, Any]) -> None:
    run.client.log_text(run.run_id, values["text"], values["name"])


def _tags(run: Delivery, values: dict[str, Any]) -> None:
    for key, value in values["values"].items():
        run.client.set_tag(run.run_id, key, value)


def _input(run: Delivery, values: dict[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    url, context = values["url"], values["context"]
    source = json.dumps({"uri": url})
    dataset = Dataset(url.rstrip("/")[-500:], values["digest"], "code", source)
    run.client.log_inputs(
        run.run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
    )
    run.client.set_tag(run.run_id, f"input.{context}", url)
    if values["producer"]:
        run.client.set_tag(run.run_id, f"input.{context}.run_id", values["producer"])


def _model(run: Delivery, values: dict[str, Any]) -> None:
    """Log the folder as the run's model and register it; the weights stay where they are."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    name, url = values["name"], values["url"]
    versions = run.client.search_model_versions(f"run_id = '{run.run_id}'")
    if any(version.source == url and version.name == name for version in versions):
        return
    experiment_id = run.client.get_run(run.run_id).info.experiment_id
    model = run.client.create_logged_model(
        experiment_id, name, source_run_id=run.run_id, tags={"source": url}
    )
    run.client.finalize_logged_model(model.model_id, "READY")
    run.client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step=values["step"])])
    try:
        run.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = run.client.create_model_version(name, url, run_id=run.run_id, model_id=model.model_id).version
    run.client.set_tag(run.run_id, "model", f"{_REGISTRY}{name}/{version}")


def _end(run: Delivery, values: dict[str, Any]) -> None:
    run.client.set_terminated(run.run_id, status=values["status"])


CALLS: dict[str, Callable[[Delivery, dict[str, Any]], None]] = {
    "params": _params,
    "metrics": _metrics,
    "record": _record,
    "redo": _redo,
    "artifact": _artifact,
    "text": _text,
    "tags": _tags,
    "input": _input,
    "model": _model,
    "end": _end,
}


# --- What could not be delivered --------------------------------------------------------------------------------------


def read_undelivered(output: str) -> tuple[Call | None, list[Call]]:
    """("start", the run's name and tags) and the calls that an earlier attempt at this output has left; (None, []) when
    there are none. Raises UserError for a damaged file."""
    url = join(output, UNDELIVERED_FILE)
    try:
        lines = read_bytes(url).splitlines()
    except FileNotFoundError:
        return None, []
    calls: list[Call] = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            calls.append((values.pop("call"), values))
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise UserError(f"{url}:{number} is no call: delete the line ({error})") from None
    begin = calls.pop(0) if calls and calls[0][0] == "start" else None
    return begin or (
        "start",
        {"name": output.rstrip("/").rsplit("/", 1)[-1], "tags": {"output": output}},
    ), calls


def write_undelivered(output: str, begin: Call | None, calls: list[Call]) -> None:
    """Keep the calls for later, behind `begin` where there is no run yet; without calls there is no file."""
    url = join(output, UNDELIVERED_FILE)
    if calls:
        lines = [
            json.dumps({"call": name, **values}, default=str, skipkeys=True) + "\n"
            for name, values in [*([begin] if begin else []), *calls]
        ]
        write_bytes(url, "".join(lines).encode())
    elif exists(url):
        fs, path = filesystem(url)
        fs.rm_file(path)


def put_aside_undelivered(output: str) -> None:
    """Rename a file that cannot be read, for a person to look at."""
    fs, path = filesystem(join(output, UNDELIVERED_FILE))
    fs.mv(path, f"{path}.damaged")


# --- Registered models ------------------------------------------------------------------------------------------------


def registered_name(url: str) -> str | None:
    """ "tiny-sft" of models:/tiny-sft@champion, models:/tiny-sft/3 and models:/tiny-sft; None for any other URL."""
    if not url.startswith(_REGISTRY):
        return None
    return url.removeprefix(_REGISTRY).partition("@")[0].partition("/")[0]


def model_folder(url: str, uri: str) -> str:
    """The folder behind models:/name@alias, models:/name/version or models:/name (its newest version) on the server
    `uri`; any other URL is itself. Raises UserError."""
    return model_version(url, uri).source if url.startswith(_REGISTRY) else url


def model_version(url: str, uri: str) -> Any:
    """MLflow's ModelVersion behind a URL of its registry. Raises UserError."""
    client = open_existing(uri)
    name, _, alias = url.removeprefix(_REGISTRY).partition("@")
    name, _, version = name.partition("/")
    try:
        if alias:
            return client.get_model_version_by_alias(name, alias)
        if version:
            return client.get_model_version(name, version)
        versions = client.search_model_versions(f"name = '{name}'")
        if versions:
            return max(versions, key=lambda found: int(found.version))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"no {url} in MLflow at {uri}: {reason}") from error
    raise UserError(f"no {url} in MLflow at {uri}: no model of that name is registered")
