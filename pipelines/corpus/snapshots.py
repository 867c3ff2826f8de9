"""The snapshots of a prepared corpus: what is new in its input, and which snapshot stands at its top.

A snapshot is a folder <output>/snapshots/NNNN with a plan of what was new and a manifest, its last file. Its plan is
kept until it is finished, so that a run that was interrupted goes on with the same work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from llada.data.read.listing import is_as_listed, list_inputs
from llada.data.read.parts import Part
from llada.data.tokens.mixture import mixture_epochs
from llada.data.work.job import Job, PrepareConfig, SourceConfig
from llada.data.work.units import Plan, SeenFiles, cut_file, read_plan, write_plan
from llada.files import join, write_bytes
from pipelines.stage.artifact import Output, StageError, config_hash, find_manifest, to_json


def snapshot_url(output: str, number: int) -> str:
    return join(output, "snapshots", f"{number:04d}")


def open_snapshot(
    config: PrepareConfig, sources: Sequence[SourceConfig], output: str
) -> tuple[Job | None, list[dict[str, Any]]]:
    """(the unfinished or next snapshot's job, or None when there is no new file; the manifests of the finished ones)."""
    earlier: list[dict[str, Any]] = []
    for number in count():
        folder = snapshot_url(output, number)
        if (manifest := find_manifest(folder)) is None:
            break
        earlier.append(manifest)
    plan_folder, listed = join(folder, "plan"), config_hash({s.name: s.input for s in sources})
    plan = read_plan(plan_folder)
    if plan is None or plan.inputs != listed:
        plan = write_plan(
            plan_folder, _new_parts(config, sources, output, earlier), config.unit_bytes, listed
        )
    return (Job(config, output, folder, plan) if plan else None), earlier


def _new_parts(
    config: PrepareConfig, sources: Sequence[SourceConfig], output: str, earlier: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, Part]]:
    """(source, part) of what no earlier snapshot holds: what could not be read then and is there now, and new files."""
    found = [read_plan(join(snapshot_url(output, number), "plan")) for number in range(len(earlier))]
    plans = [plan for plan in found if plan]
    seen = SeenFiles(plans) if plans else None
    unreadable = set(earlier[-1]["counts"]["unreadable_files"]) if earlier else set()
    never_read = {_url(label) for label in unreadable}
    for plan in plans if unreadable else ():
        for unit in (unit for group in range(plan.groups) for unit in plan.group(group)):
            never_read -= {part.file.url for part in unit.parts if part.label not in unreadable}
            again = [part for part in unit.parts if part.label in unreadable and is_as_listed(part.file)]
            unreadable -= {part.label for part in again}
            yield from ((unit.source, part) for part in again)
    for source in sources:
        for file in list_inputs(source.input):
            if seen and seen.is_known(source.name, file):
                continue
            is_changed = seen and seen.is_changed(source.name, file) and file.url not in never_read
            if is_changed and not config.dedup.exact:
                raise ValueError(
                    f"{file.url} has changed since it was prepared, so what is in it twice would come twice: "
                    "restore it, give the new text another name, switch dedup.exact on, or choose another --output"
                )
            yield from ((source.name, part) for part in cut_file(file, config.unit_bytes))


def refresh(
    folder: Output, sources: Sequence[SourceConfig], earlier: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The newest manifest; its mixture follows the sources' weights, which may change without any work."""
    if not earlier:
        raise StageError("there is no file to read in " + ", ".join(url for s in sources for url in s.input))
    newest, top = earlier[-1], find_manifest(folder.url)
    epochs = source_epochs(sources, newest["dataset"]["sources"])
    name = f"snapshots/{len(earlier) - 1:04d}"
    if top is None or (top["snapshot"], top["dataset"]["epochs"]) != (name, epochs):
        newest = {**newest, "dataset": {**newest["dataset"], "epochs": epochs}}
        top = publish(folder, newest, len(earlier) - 1)
    return top


def publish(folder: Output, manifest: dict[str, Any], number: int) -> dict[str, Any]:
    """Write a snapshot's manifest, and then the folder's own, which names it; the latter."""
    top = {**manifest, "snapshot": f"snapshots/{number:04d}"}
    for url, content in ((snapshot_url(folder.url, number), manifest), (folder.url, top)):
        write_bytes(join(url, "manifest.json"), to_json(content))
    return top


def still_unread(plan: Plan, labels: Sequence[str]) -> list[str]:
    """Those parts of earlier snapshots that could not be read then and were not there to be tried again, as they were
    or in a new version of their file."""
    left = {_url(label) for label in labels}
    for unit in (unit for group in range(plan.groups if labels else 0) for unit in plan.group(group)):
        left -= {part.file.url for part in unit.parts}
    return [label for label in labels if _url(label) in left]


def _url(label: str) -> str:
    """The file of a part (see `Part.label`)."""
    return re.sub(r"#\d+-\d*$", "", label)


def source_epochs(sources: Sequence[SourceConfig], trained: dict[str, dict[str, int]]) -> dict[str, float]:
    """The passes over each source; empty when every row comes once."""
    epochs = mixture_epochs(sources, {name: counts["tokens"] for name, counts in trained.items()})
    return {} if all(passes == 1 for passes in epochs.values()) else epochs
