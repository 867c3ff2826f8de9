"""How a stage begins and ends: its output folder and its MLflow run, told the same things.

folder = begin_stage("evaluate", output, config=asdict(config), inputs=[folder_input("model", model)], tracker=tracker)
if folder.manifest is not None:
    return folder.manifest       # the same work was done before
...
return finish_stage(folder, tracker, counts, kind="evaluation", artifacts=("results.json",))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llada.errors import UserError
from llada.files import entry_at, join, sha256
from llada.settings import flatten_settings
from pipelines.stage.artifact import Change, Manifest, Output, find_manifest, folder_id, open_output
from pipelines.stage.tracking import Tracker


@dataclass(frozen=True)
class StageInput:
    """A folder or file that a stage reads."""

    role: str
    """What it is to the stage: "model", "data", "prompts"."""
    url: str
    id: str
    """Changes with the content."""
    manifest: Manifest | None = None
    """Of a folder that a stage of ours made."""


def folder_input(role: str, url: str) -> StageInput:
    """The folder at `url` as an input."""
    return StageInput(role, url, folder_id(url), find_manifest(url))


def named_input(role: str, url: str) -> StageInput:
    """What a user names at `url`, a file or a folder, as an input. Raises UserError when nothing is there."""
    entry = entry_at(url)
    if entry is None:
        raise UserError(f"there is no file {url}")
    return (
        folder_input(role, url) if entry["type"] == "directory" else StageInput(role, url, sha256(url)[:16])
    )


def begin_stage(
    stage: str,
    output: str,
    *,
    config: dict[str, Any],
    inputs: Sequence[StageInput],
    tracker: Tracker | None,
    in_force: Mapping[str, Any] | None = None,
    **may: Any,
) -> Output:
    """Open the output folder (`may`: see `open_output`); unless it is complete, tell MLflow the settings and the inputs.
    `in_force` are those of the settings that this configuration makes use of; None: all. MLflow's parameters cannot change:
    those of settings that did keep the first value, and tags tell the rest."""
    folder = open_output(
        output,
        stage=stage,
        config=config,
        inputs=[{"url": entry.url, "id": entry.id} for entry in inputs],
        **may,
    )
    if tracker and not folder.is_complete:
        changed = {name for change in folder.history for name in change["changed"]}
        params = flatten_settings(config) if in_force is None else in_force
        tracker.log_params({name: value for name, value in params.items() if name not in changed})
        if folder.history:
            tracker.set_tags(
                {f"changed.step_{change['step']}": told_change(change) for change in folder.history}
            )
        for entry in inputs:
            tracker.log_input(entry.url, context=entry.role, manifest=entry.manifest)
    return folder


def told_change(change: Change) -> str:
    """ "optim.lr 0.001 -> 0.0005, train.compile False -> True"."""
    return ", ".join(f"{name} {before} -> {now}" for name, (before, now) in change["changed"].items())


def finish_stage(
    folder: Output,
    tracker: Tracker | None,
    counts: Mapping[str, Any],
    *,
    kind: str,
    artifacts: Sequence[str] = (),
    **sections: Any,
) -> Manifest:
    """Write the manifest (see `Output.describe`) and hand MLflow its figures, the manifest and the files `artifacts`."""
    run_id = tracker.wait_started() if tracker else None
    manifest = folder.finish(counts, kind=kind, mlflow_run_id=run_id, **sections)
    if tracker:
        tracker.log_metrics(counts)
        for name in (*artifacts, "manifest.json"):
            tracker.log_artifact(join(folder.url, name))
    return manifest
