"""A stage's output: one self-contained folder at any fsspec URL, its manifest.json written last.

    output = open_output(url, stage="prepare", config={...}, inputs=[{"url", "id"}, ...])
    if output.is_complete: return output.manifest        # the same work was done before
    ... write files below output.url ...
    output.finish({...}, kind="tokens")                  # the counts, and what the folder is

`stage.json`, written first, holds what the folder is for, so that a crashed stage is resumed and a folder of another
stage, configuration or input is never written over; a stage that is refused before it has made anything takes it back.
Paths and worker counts stay out of the configuration's hash: the same data in another place, or made by another cluster, is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from llada.data.tokens.manifest import FileEntry
from llada.errors import UserError
from llada.files import (
    absolute,
    file_sizes,
    filesystem,
    join,
    local_path,
    read_bytes,
    storage_errors,
    write_bytes,
)
from llada.settings import flatten_settings

# {name in the folders of earlier versions: name today} of settings, dotted: such folders go on under the new names.
RENAMED_SETTINGS = {"objective.objective": "objective.kind"}
# Which run of MLflow a folder's is, and what MLflow has not been told yet of its runs (delivery.py).
RUN_FILE = "tracking.json"
UNDELIVERED_FILE = "tracking-undelivered.jsonl"
_PACKAGES = ("torch", "ray", "transformers", "tokenizers", "pyarrow", "numpy", "mlflow")
# The folders that a stage of ours has begun: in another that is there, another process may be at work.
_begun: ContextVar[set[str]] = ContextVar("begun")


class OtherWorkError(UserError):
    """The output folder belongs to other work."""


class Input(TypedDict):
    """What a stage has read. `id` changes with the content, the URL only says where it was."""

    url: str
    id: str


class Change(TypedDict):
    """A stage has gone on with other settings."""

    step: int
    """How far it was."""
    at: str
    """UTC, ISO 8601."""
    changed: dict[str, list[Any]]
    """By dotted name: before and since; "unset" where there was no such setting."""


class Manifest(TypedDict):
    """manifest.json: what a finished folder holds, and what it was made from."""

    kind: str
    """What the folder is: "tokens", "checkpoint", "evaluation" or "generations"."""
    stage: str
    config: dict[str, Any]
    config_hash: str
    inputs: list[Input]
    counts: dict[str, Any]
    """Figures of the stage, by name."""
    files: dict[str, FileEntry]
    """By path below the folder (below the snapshot, where there are any)."""
    git_commit: str | None
    versions: dict[str, str]
    created_at: str
    """UTC, ISO 8601."""
    mlflow_run_id: str | None
    dataset: NotRequired[dict[str, Any]]
    """Of "tokens": what training needs to know (keys: `DatasetEntry`, llada/data/tokens/manifest.py)."""
    snapshot: NotRequired[str]
    """Of "tokens": the newest snapshot's folder, relative."""
    results: NotRequired[dict[str, Any]]
    """Of "evaluation": the content of results.json."""
    history: NotRequired[list[Change]]
    """Of a stage that went on with other settings; `config` holds the last ones."""


@dataclasses.dataclass
class Output:
    """An opened output folder. `manifest` is set once the stage is complete."""

    url: str
    stage: str
    config: dict[str, Any]
    inputs: list[Input]
    manifest: Manifest | None = None
    history: list[Change] = dataclasses.field(default_factory=list)
    """As `Manifest`'s; also in stage.json, from the moment on when the stage goes on."""

    @property
    def is_complete(self) -> bool:
        """True when the manifest is written: the stage can be skipped."""
        return self.manifest is not None

    def finish(self, counts: Mapping[str, Any], **described: Any) -> Manifest:
        """Write the manifest (see `describe`), which makes the folder complete, and return it."""
        self.manifest = self.describe(counts, **described)
        with storage_errors(self.url):
            write_bytes(join(self.url, "manifest.json"), to_json(self.manifest))
        return self.manifest

    def describe(
        self,
        counts: Mapping[str, Any],
        *,
        kind: str,
        files: Mapping[str, FileEntry] | None = None,
        mlflow_run_id: str | None = None,
        **sections: Any,
    ) -> Manifest:
        """The manifest of what the stage has made.

        kind       what the folder is, e.g. "tokens" or "checkpoint"
        files      their presence is checked before the stage is skipped next time
        sections   those entries of the manifest that not every kind has
        """
        manifest = {
            "kind": kind,
            "stage": self.stage,
            "config": self.config,
            "config_hash": config_hash(self.config),
            "inputs": self.inputs,
            "counts": dict(counts),
            **sections,
            **({"history": self.history} if self.history else {}),
            "files": dict(files or {}),
            "git_commit": git_commit(),
            "versions": _package_versions(),
            "created_at": _now(),
            "mlflow_run_id": mlflow_run_id,
        }
        return cast(Manifest, manifest)


def config_hash(config: Mapping[str, Any]) -> str:
    """16 hex digits that are equal when the configurations are."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def open_output(
    url: str,
    *,
    stage: str,
    config: Mapping[str, Any],
    inputs: Sequence[Input],
    may_change: Collection[str] = (),
    may_extend: Collection[str] = (),
    extend: bool = False,
    defaults: Mapping[str, Any] | None = None,
    done: int = 0,
) -> Output:
    """Open (or create) the output folder of a stage for one configuration and its inputs.

    An input is {"url", "id"}; only the ids are compared. `may_change` names settings (dotted) that an unfinished folder
    may go on with changed, `may_extend` those that also a finished one may when `extend` asks for it: it then counts as
    unfinished until its new manifest replaces the old. `defaults` are what settings (dotted) stand for in folders that were
    begun before there were such settings. What has changed is recorded in `history`, from the step `done` on, which says how
    far the stage is. Raises UserError when the folder belongs to other work.
    """
    defaults = json.loads(json.dumps(defaults or {}))
    plain = json.loads(json.dumps(config))  # tuples become lists, as they will be when read back
    output = Output(url, stage, plain, list(inputs))
    with storage_errors(url):
        manifest = _read_json(join(url, "manifest.json"))
        earlier = manifest or _read_json(join(url, "stage.json"))
        if earlier is None:
            if names := _made(url):
                raise UserError(
                    f"{url} is not empty ({min(names)} ...) and no stage made it; choose another --output"
                )
            described = {
                "stage": stage,
                "config": plain,
                "config_hash": config_hash(plain),
                "inputs": output.inputs,
            }
            write_bytes(join(url, "stage.json"), to_json(described))
            _begun.get(set()).add(absolute(url))
            return output
        allowed = {*may_extend, *may_change} if extend else {*(() if manifest else may_change)}
        if differences := _differences(earlier, output, allowed, defaults):
            remedy = "choose another --output or delete it"
            if may_extend and not _differences(earlier, output, {*may_extend, *may_change}, defaults):
                remedy = (
                    "with --resume a run goes on to a new length and schedule; or choose another --output"
                )
            raise OtherWorkError(f"{url} already holds other work: {differences}; {remedy}")
        is_same = not _differences(earlier, output, (), defaults)
        if manifest and is_same and _has_files(url, manifest):
            output.manifest = cast(Manifest, manifest)
        else:
            _record_change(output, defaults, done)
    return output


@contextlib.contextmanager
def given_back_if_refused(url: str) -> Iterator[None]:
    """For a `with` block that is a stage: where it begins the folder and is refused (UserError) before it has made anything but
    logs, the folder belongs to nobody again, so that the remedy, which is other settings or inputs, may be given with it."""
    begun: set[str] = set()
    token = _begun.set(begun)
    try:
        yield
    except OtherWorkError:
        raise
    except UserError:
        if absolute(url) in begun:
            with contextlib.suppress(OSError):  # what is wrong is to be told, whatever becomes of the folder
                _give_back(url)
        raise
    finally:
        _begun.reset(token)


def _give_back(url: str) -> None:
    made = _made(url)
    if set(made) <= {"stage.json", RUN_FILE}:
        fs, root = filesystem(url)
        # stage.json last: a folder that has anything belongs to somebody.
        for name in sorted(made, key=lambda name: name == "stage.json"):
            fs.rm_file(join(root, name))


def _made(url: str) -> list[str]:
    """What a folder holds of a stage; Ray's logs and what `llada track` is to deliver are nobody's work."""
    left = {UNDELIVERED_FILE, f"{UNDELIVERED_FILE}.damaged"}
    return [name for name in file_sizes(url) if not name.startswith("logs/") and name not in left]


def _record_change(output: Output, defaults: Mapping[str, Any], done: int) -> None:
    """Bring stage.json up to date with the settings that the stage goes on with."""
    url = join(output.url, "stage.json")
    begun = _read_json(url)
    if begun is None:
        return
    output.history = begun.get("history", [])
    now = _settings_by_name(output.config)
    before = _settings_before(begun, now, defaults)
    changed = {
        name: [before.get(name, "unset"), now.get(name, "unset")]
        for name in sorted(before.keys() | now.keys())
        if before.get(name, "unset") != now.get(name, "unset")
    }
    if changed:
        output.history = [*output.history, {"step": done, "at": _now(), "changed": changed}]
        described = {"config": output.config, "config_hash": config_hash(output.config)}
        write_bytes(url, to_json({**begun, **described, "history": output.history}))


def _settings_before(
    earlier: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """{dotted name of today: value} of a folder, which may be older than some of the settings of now."""
    known = {name: value for name, value in defaults.items() if name in now}
    return known | _settings_by_name(earlier.get("config", {}))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _differences(
    earlier: Mapping[str, Any], output: Output, may_change: Collection[str], defaults: Mapping[str, Any]
) -> str:
    if earlier.get("stage") != output.stage:
        return f"the output of stage {earlier.get('stage')!r}, not {output.stage!r}"
    now = _settings_by_name(output.config)
    before = _settings_before(earlier, now, defaults)
    changed = [
        f"{key} {before.get(key, 'unset')!r} (now {now.get(key, 'unset')!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "unset") != now.get(key, "unset") and key not in may_change
    ]
    if changed:
        return (
            "made with "
            + ", ".join(changed[:5])
            + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        )
    read_before = {entry["id"]: entry["url"] for entry in earlier.get("inputs", [])}
    read_now = {entry["id"]: entry["url"] for entry in output.inputs}
    if [e["id"] for e in earlier.get("inputs", [])] != [e["id"] for e in output.inputs]:
        differing = [read_now[i] for i in read_now if i not in read_before]
        differing += [read_before[i] for i in read_before if i not in read_now]
        return (
            f"made from other inputs ({', '.join(dict.fromkeys(differing[:3])) or 'another order'} changed)"
        )
    return ""


def _settings_by_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted name of today: value}."""
    return {RENAMED_SETTINGS.get(name, name): value for name, value in flatten_settings(config).items()}


def _has_files(url: str, manifest: Mapping[str, Any]) -> bool:
    fs, path = filesystem(join(url, manifest["snapshot"]) if "snapshot" in manifest else url)
    try:
        return all(fs.size(join(path, n)) == entry["bytes"] for n, entry in manifest.get("files", {}).items())
    except FileNotFoundError:
        return False


def read_manifest(url: str) -> Manifest:
    """The manifest of a complete folder. Raises UserError saying what `url` is instead."""
    with storage_errors(url):
        if (manifest := find_manifest(url)) is not None:
            return manifest
        if begun := _read_json(join(url, "stage.json")):
            raise UserError(f"{url} is not complete: run the stage {begun.get('stage')!r} again to finish it")
        raise UserError(f"no manifest.json at {url}: it is not the output folder of a stage")


def find_manifest(url: str) -> Manifest | None:
    """The manifest of a folder, or None when no stage of ours made it."""
    with storage_errors(url):
        return cast("Manifest | None", _read_json(join(url, "manifest.json")))


def link_run(url: str, run_id: str) -> None:
    """Write the MLflow run into the manifests of a finished folder that do not name one yet."""
    manifest = find_manifest(url)
    if manifest is None:
        return
    for folder in dict.fromkeys([join(url, manifest["snapshot"]) if "snapshot" in manifest else url, url]):
        found = find_manifest(folder)
        if found is not None and found["mlflow_run_id"] is None:
            write_bytes(join(folder, "manifest.json"), to_json({**found, "mlflow_run_id": run_id}))


def folder_id(url: str) -> str:
    """An id of what an input folder holds: from its manifest's checksums; without a manifest, from the files' names,
    sizes and ETags or modification times."""
    manifest = find_manifest(url)
    if manifest is None:
        with storage_errors(url):
            return config_hash(_file_versions(url))
    content = manifest.get("files") or manifest.get("dataset") or manifest["counts"]
    return config_hash({"config": manifest["config_hash"], "content": content})


def fetch_folder(url: str) -> Path:
    """A local copy of a folder: itself when local, else in the cache, which is keyed by the remote files. Training
    state and logs stay where they are. Processes of one machine that want the same fetch it once.

    The cache is $LLADA_CACHE, or ~/.cache/llada. Raises UserError when there is nothing at `url`.
    """
    if (path := local_path(url)) is not None:
        if not os.path.isdir(path):
            raise UserError(f"no folder at {url}")
        return Path(path)
    with storage_errors(url):
        fs, root = filesystem(url)
        versions = {
            name: version
            for name, version in _file_versions(url).items()
            if not name.startswith(("checkpoints/", "logs/"))
        }
        if not versions:
            raise UserError(f"no folder at {url}")
        key = hashlib.sha256(json.dumps([url, versions], sort_keys=True).encode()).hexdigest()[:24]
        base = Path(os.environ.get("LLADA_CACHE") or Path.home() / ".cache" / "llada")
        target = base / key
        base.mkdir(parents=True, exist_ok=True)
        with open(base / f".{key}.lock", "w") as lock:
            fcntl.flock(
                lock, fcntl.LOCK_EX
            )  # the first process of this machine fetches, the others wait for it
            if not target.is_dir():
                partial = base / f".{key}.{uuid.uuid4().hex}"  # renamed when whole
                try:
                    for name in versions:
                        (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    fs.get(
                        [join(root, name) for name in versions], [str(partial / name) for name in versions]
                    )
                    partial.rename(target)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
        return target


def _file_versions(url: str) -> dict[str, list[Any]]:
    """{path in the folder: [bytes, ETag or modification time]} of every file; empty when there is no folder."""
    fs, root = filesystem(url)
    if not fs.isdir(root):
        return {}
    start = len(root.rstrip("/")) + 1
    return {
        name[start:]: [info["size"], str(info.get("ETag") or info.get("etag") or info.get("mtime"))]
        for name, info in sorted(fs.find(root, detail=True).items())
        if info["type"] == "file"
    }


def require_same_tokenizer(model: str, data: str) -> None:
    """Raises UserError unless every token of the checkpoint's tokenizer has the same id in the prepared folder's.

    Silent when the checkpoint comes without a tokenizer.
    """
    try:
        ours = _vocabulary(join(model, "tokenizer.json"))
    except FileNotFoundError:
        return
    theirs = _vocabulary(join(data, "tokenizer", "tokenizer.json"))
    if different := [token for token, number in ours.items() if theirs.get(token) != number]:
        raise UserError(
            f"{data} was not tokenised with the tokenizer of {model} ({len(different):,} of {len(ours):,} tokens "
            f"differ, such as {min(different)!r}): prepare the data with --tokenizer {model}"
        )


def _vocabulary(url: str) -> dict[str, int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(read_bytes(url).decode()).get_vocab(with_added_tokens=True)


def put_folder(local: str | Path, url: str) -> None:
    """Copy a local folder to `url`, its manifest.json (if any) last."""
    names = [str(p.relative_to(local)) for p in sorted(Path(local).rglob("*")) if p.is_file()]
    fs, root = filesystem(url)
    with storage_errors(url):
        for name in sorted(names, key=lambda name: (name == "manifest.json", name)):
            if local_path(url) is not None:
                write_bytes(join(url, name), (Path(local) / name).read_bytes())
            else:
                fs.put_file(str(Path(local) / name), join(root, name))


def _read_json(url: str) -> dict[str, Any] | None:
    try:
        data = read_bytes(url)
    except FileNotFoundError:
        return None
    try:
        values = json.loads(data)
    except ValueError:
        raise UserError(f"{url} is not JSON: delete the folder and run its stage again") from None
    if not isinstance(values, dict):
        raise UserError(f"{url} holds no settings: delete the folder and run its stage again")
    return values


def to_json(value: Any) -> bytes:
    """A manifest's bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def git_commit() -> str | None:
    """The commit of this source tree, or None when it is installed without git."""
    if commit := os.environ.get("LLADA_GIT_COMMIT"):  # container images carry no .git
        return commit
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
