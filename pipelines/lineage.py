"""The command `lineage`: what an answer, a checkpoint or data came from.

    llada lineage https://llm.example.org     asks the endpoint for a token, and goes back from that answer
    llada lineage chatcmpl-3f…c2-91…7e        an answer's id holds the MLflow run of the checkpoint that gave it
    llada lineage s3://bucket/sft             the folder of a stage, or models:/NAME@ALIAS

Back through what each stage has read to the raw files, by the manifests in the folders, which hold commit, MLflow run and what
the input was; an input that is no longer that is told. MLflow is asked for the place of a run only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

import httpx
import tyro

from llada.data.tokens.manifest import resolve_snapshot
from llada.data.work.units import Plan
from llada.errors import UserError
from llada.files import absolute, exists, join
from llada.settings import check_limits, limited, require
from pipelines.corpus.snapshots import finished_snapshots
from pipelines.stage.artifact import Manifest, folder_id, read_manifest
from pipelines.stage.command import parse, run_command
from pipelines.stage.delivery import model_folder, open_existing
from pipelines.stage.tracking import default_tracking_uri

# What the endpoint's writers make of a run (pipelines/serving/dialects/writer.py).
_ANSWER = re.compile(r"[a-z]+[-_]((?P<run>[0-9a-f]{32})-)?[0-9a-f]{32}")
_PATIENCE_S = 300.0


@dataclass(frozen=True)
class LineageArgs:
    """What an answer, a checkpoint or data came from: stages, commits, MLflow runs, down to the raw files."""

    what: Annotated[str, tyro.conf.Positional]
    """An endpoint's http(s):// URL (its key, if it wants one: $OPENAI_API_KEY), an answer's id, a stage's folder at any other URL,
    or models:/NAME@ALIAS."""
    tracking_uri: str | None = None
    """MLflow of the answer's run and of models:/…; default $MLFLOW_TRACKING_URI, else mlflow.db in this folder."""
    files: int = limited(3, low=0)
    """Raw files that are named, of each snapshot; all are counted."""
    json: bool = False
    """The same as JSON."""

    def __post_init__(self) -> None:
        check_limits(self, "lineage")


@dataclass(frozen=True)
class Raw:
    """What one snapshot of a prepared folder has read."""

    snapshot: str
    created_at: str
    git_commit: str | None
    files: int
    bytes: int
    first_files: tuple[str, ...]


@dataclass(frozen=True)
class Read:
    """An input of a stage, and whether what it has read then is there now."""

    url: str
    state: Literal["same", "changed", "gone", "not made by a stage"]


@dataclass(frozen=True)
class Folder:
    """What one stage has made, and from what."""

    url: str
    kind: str
    stage: str
    created_at: str
    git_commit: str | None
    mlflow_run_id: str | None
    config_hash: str
    inputs: tuple[Read, ...]
    raw: tuple[Raw, ...] = ()
    """Of prepared data: its snapshots up to this one."""


@dataclass(frozen=True)
class Lineage:
    """From what was asked for back to its sources."""

    answer: str | None
    """The id of the answer that was traced, where it was one."""
    folder: str
    """Where the way begins: a key of `folders`."""
    folders: dict[str, Folder]


def main(argv: Sequence[str]) -> None:
    """`llada lineage …`"""
    args = parse(LineageArgs, argv, "lineage")
    uri = args.tracking_uri or default_tracking_uri("lineage")
    answer = ask(args.what) if args.what.startswith(("http://", "https://")) else args.what
    if _ANSWER.fullmatch(answer):
        folder = answering_folder(answer, uri)
    else:
        answer, folder = "", absolute(model_folder(args.what, uri))
    folders = trace(folder, files=args.files)
    lineage = Lineage(answer or None, next(iter(folders)), folders)
    if args.json:
        print(json.dumps(dataclasses.asdict(lineage), indent=1, ensure_ascii=False))
    else:
        print("\n".join(draw(lineage)))


# --- From an answer to a folder ---------------------------------------------------------------------------------------


def ask(endpoint: str) -> str:
    """The id of an answer of one token. Raises UserError where there is none."""
    body = {"prompt": "?", "max_tokens": 1}
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{endpoint.rstrip('/').removesuffix('/v1')}/v1/completions"
    try:
        answer = httpx.post(url, json=body, headers=headers, timeout=_PATIENCE_S)
        name = answer.json()["id"] if answer.is_success else ""
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"no endpoint answers at {endpoint} ({error or type(error).__name__})") from None
    require(answer.is_success, f"{endpoint} answers with status {answer.status_code}: {answer.text[:200]}")
    require(
        bool(_ANSWER.fullmatch(str(name))),
        f"{endpoint} is no endpoint of llada: its answer is called {name!r}",
    )
    return name


def answering_folder(answer: str, uri: str) -> str:
    """The checkpoint that gave an answer. Raises UserError."""
    found = _ANSWER.fullmatch(answer)
    run = found and found["run"]
    if run is None:
        raise UserError(
            f"{answer} names no MLflow run, for its checkpoint had none: name the folder that was served"
        )
    client = open_existing(uri)
    try:
        folder = client.get_run(run).data.tags.get("output")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"no run {run} in MLflow at {uri} ({reason}): give its --tracking-uri") from error
    require(
        folder is not None, f"the run {run} in MLflow at {uri} is none of a stage: it has no tag `output`"
    )
    made_by = read_manifest(folder)["mlflow_run_id"]
    require(
        made_by == run,
        f"{folder} is another checkpoint now, of the run {made_by}; {answer} came from the run {run}",
    )
    return folder


# --- From a folder to its sources -------------------------------------------------------------------------------------


def trace(url: str, *, files: int = 3) -> dict[str, Folder]:
    """{URL: what a stage has made there} of a folder, which comes first (of prepared data: its newest snapshot), and of all
    that it came from. Raises UserError when no stage made it."""
    found: dict[str, Folder] = {}
    manifest = read_manifest(url)
    if "snapshot" in manifest:
        url = resolve_snapshot(url)
    waiting = [url]
    while waiting:
        url = waiting.pop()
        if url not in found:
            found[url] = _look(url, read_manifest(url), files)
            waiting += [read.url for read in found[url].inputs if read.state in ("same", "changed")]
    return found


def _look(url: str, manifest: Manifest, files: int) -> Folder:
    return Folder(
        url=url,
        kind=manifest["kind"],
        stage=manifest["stage"],
        created_at=manifest["created_at"],
        git_commit=manifest["git_commit"],
        mlflow_run_id=manifest["mlflow_run_id"],
        config_hash=manifest["config_hash"],
        inputs=tuple(Read(entry["url"], _state(entry["url"], entry["id"])) for entry in manifest["inputs"]),
        raw=tuple(_raw(url, files)),
    )


def _state(url: str, read: str) -> Literal["same", "changed", "gone", "not made by a stage"]:
    """Of an input that was `read` under this id."""
    if not exists(url):
        return "gone"
    if not exists(join(url, "manifest.json")):
        return "not made by a stage"
    return "same" if folder_id(url) == read else "changed"


def _raw(url: str, files: int) -> Iterator[Raw]:
    """What the snapshots up to the one at `url` have read; nothing of a folder that is none."""
    output, _, number = url.rpartition("/snapshots/")
    if not output:
        return
    for finished in finished_snapshots(output)[: int(number) + 1]:
        if plan := finished.read_plan():
            yield Raw(
                snapshot=finished.snapshot.url,
                created_at=finished.manifest["created_at"],
                git_commit=finished.manifest["git_commit"],
                files=plan.files,
                bytes=plan.bytes,
                first_files=tuple(islice(_files(plan), files)),
            )


def _files(plan: Plan) -> Iterator[str]:
    """The URLs of what a snapshot has read, each once."""
    for group in range(plan.groups):
        for unit in plan.group(group):
            yield from (part.file.url for part in unit.parts if part.start == 0)


# --- As a tree --------------------------------------------------------------------------------------------------------


def draw(lineage: Lineage) -> Iterator[str]:
    """The lines of a tree. What comes twice is drawn once."""
    if lineage.answer:
        yield f"answer {lineage.answer}"
    yield from _draw(lineage.folder, lineage.folders, set(), "", "")


def _draw(
    url: str, folders: dict[str, Folder], drawn: set[str], first: str, rest: str, state: str = "same"
) -> Iterator[str]:
    told = (
        ""
        if state == "same"
        else "  (it has changed since it was read)"
        if state == "changed"
        else f"  ({state})"
    )
    if url in drawn:
        told += "  (see above)"
    yield f"{first}{url}{told}"
    if url not in folders or url in drawn:
        return
    drawn.add(url)
    folder = folders[url]
    yield rest + _about(
        f"{folder.kind} by {folder.stage}",
        folder.created_at,
        commit=folder.git_commit,
        run=folder.mlflow_run_id,
    )
    below = len(folder.inputs) + len(folder.raw)
    for read in folder.inputs:
        below -= 1
        yield from _draw(read.url, folders, drawn, *_branch(rest, is_last=not below), read.state)
    for raw in folder.raw:
        below -= 1
        first, other = _branch(rest, is_last=not below)
        name = raw.snapshot.rpartition("/snapshots/")[2]
        yield f"{first}raw files of snapshot {name}: {raw.files:,} ({raw.bytes:,} bytes)"
        yield other + _about(raw.created_at, commit=raw.git_commit)
        yield from (f"{other}  {file}" for file in raw.first_files)
        if raw.files > len(raw.first_files):
            yield f"{other}  … {raw.files - len(raw.first_files):,} more (--files)"


def _branch(rest: str, *, is_last: bool) -> tuple[str, str]:
    """What stands before the first line of a branch, and before the others."""
    return (f"{rest}└─ ", f"{rest}   ") if is_last else (f"{rest}├─ ", f"{rest}│  ")


def _about(*facts: str | None, commit: str | None, run: str | None = None) -> str:
    named = [f"commit {commit[:10]}" if commit else None, f"MLflow run {run}" if run else None]
    return "   " + " · ".join(fact for fact in [*facts, *named] if fact)


if __name__ == "__main__":
    run_command("lineage")
