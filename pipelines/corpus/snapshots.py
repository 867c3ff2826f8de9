"""The snapshots of a prepared corpus: what is new in its input, and which snapshot stands at its top.

A snapshot is a folder <output>/snapshots/NNNN with a plan of what was new and a manifest, its last file. Its plan is
kept until it is finished, so that a run that was interrupted goes on with the same work.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from llada.data.left_out import FilesLeftOut, summary
from llada.data.read.listing import is_as_listed, list_inputs
from llada.data.read.parts import InputFile, Part
from llada.data.tokens.manifest import MANIFEST, DatasetEntry
from llada.data.tokens.mixture import mixture_epochs
from llada.data.work.config import PrepareConfig, SourceConfig
from llada.data.work.job import Snapshot
from llada.data.work.units import Plan, SeenFiles, cut_file, read_plan, write_plan
from llada.errors import UserError
from llada.files import join, write_bytes
from llada.store_errors import StoreError
from pipelines.stage.artifact import Manifest, Output, config_hash, find_manifest, to_json

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A finished snapshot, and what its manifest says."""

    snapshot: Snapshot
    manifest: Manifest

    @property
    def dataset(self) -> DatasetEntry:
        return DatasetEntry.from_json(self.manifest["dataset"])

    @property
    def dedup_id(self) -> str:
        return self.manifest["counts"]["dedup_id"]

    @property
    def resources_hash(self) -> str:
        return self.manifest["counts"]["resources_hash"]

    @property
    def unreadable_files(self) -> list[str]:
        """Labels of the parts of this and earlier snapshots that could not be read."""
        return self.manifest["counts"]["unreadable_files"]

    def read_plan(self) -> Plan | None:
        """Its work units."""
        return read_plan(self.snapshot.plan_url)


def finished_snapshots(output: str) -> list[Finished]:
    """Those of a prepared folder, from the first on."""
    finished: list[Finished] = []
    for number in count():
        snapshot = Snapshot(output, number)
        if (manifest := find_manifest(snapshot.url)) is None:
            break
        finished.append(Finished(snapshot, manifest))
    return finished


def open_plan(
    config: PrepareConfig,
    sources: Sequence[SourceConfig],
    snapshot: Snapshot,
    earlier: Sequence[Finished],
    written: Sequence[str] = (),
) -> Plan | None:
    """The work units of an unfinished or new snapshot; None when there is no new file. What is left out of the input is
    said; what is `written` belongs to it."""
    listed = config_hash({source.name: source.input for source in sources})
    plan = read_plan(snapshot.plan_url)
    if plan is None or plan.inputs != listed:
        left_out: FilesLeftOut = {}
        parts = _new_parts(config, sources, earlier, written, left_out)
        plan = write_plan(snapshot.plan_url, parts, config.unit_bytes, listed, left_out)
    else:
        left_out = plan.left_out
    if left_out:
        _log.warning("left out of the input: %s", summary(left_out))
    return plan


def _new_parts(
    config: PrepareConfig,
    sources: Sequence[SourceConfig],
    earlier: Sequence[Finished],
    written: Sequence[str],
    left_out: FilesLeftOut,
) -> Iterator[tuple[str, Part]]:
    """(source, part) of what no earlier snapshot holds: what could not be read then and is there now, and new files."""
    plans = [plan for plan in (finished.read_plan() for finished in earlier) if plan]
    seen = SeenFiles(plans) if plans else None
    unreadable = set(earlier[-1].unreadable_files) if earlier else set()
    never_read = {file_of(label) for label in unreadable}
    for plan in plans if unreadable else ():
        for unit in (unit for group in range(plan.groups) for unit in plan.group(group)):
            never_read -= {part.file.url for part in unit.parts if part.label not in unreadable}
            again = [part for part in unit.parts if part.label in unreadable and _is_there(part.file)]
            unreadable -= {part.label for part in again}
            yield from ((unit.source, part) for part in again)
    for source in sources:
        for file in list_inputs(source.input, written=written, left_out=left_out):
            if seen and seen.is_known(source.name, file):
                continue
            is_changed = seen and seen.is_changed(source.name, file) and file.url not in never_read
            if is_changed and not config.dedup.exact:
                raise UserError(
                    f"{file.url} has changed since it was prepared, so what is in it twice would come twice: "
                    "restore it, give the new text another name, switch dedup.exact on, or choose another --output"
                )
            yield from ((source.name, part) for part in cut_file(file, config.unit_bytes))


def _is_there(file: InputFile) -> bool:
    """As far as its store says."""
    try:
        return is_as_listed(file)
    except StoreError:
        return False


def refresh(folder: Output, sources: Sequence[SourceConfig], earlier: Sequence[Finished]) -> Manifest:
    """The newest manifest; its mixture follows the sources' weights, which may change without any work."""
    if not earlier:
        raise UserError("there is no file to read in " + ", ".join(url for s in sources for url in s.input))
    newest, top = earlier[-1], find_manifest(folder.url)
    epochs = source_epochs(sources, newest.dataset.sources or {})
    if top is None or (top["snapshot"], top["dataset"]["epochs"]) != (newest.snapshot.name, epochs):
        manifest = newest.manifest.copy()
        manifest["dataset"] = {**manifest["dataset"], "epochs": epochs}
        top = publish(manifest, newest.snapshot)
    return top


def publish(manifest: Manifest, snapshot: Snapshot) -> Manifest:
    """Write a snapshot's manifest, and then the folder's own, which names it; the latter."""
    top = manifest.copy()
    top["snapshot"] = snapshot.name
    write_bytes(snapshot.manifest_url, to_json(manifest))
    write_bytes(join(snapshot.output, MANIFEST), to_json(top))
    return top


def still_unread(plan: Plan, labels: Sequence[str]) -> list[str]:
    """Those parts of earlier snapshots that could not be read then and were not there to be tried again, as they were
    or in a new version of their file."""
    left = {file_of(label) for label in labels}
    for unit in (unit for group in range(plan.groups if labels else 0) for unit in plan.group(group)):
        left -= {part.file.url for part in unit.parts}
    return [label for label in labels if file_of(label) in left]


def file_of(label: str) -> str:
    """The URL of the file of a part (see `Part.label`)."""
    return re.sub(r"#\d+-\d*$", "", label)


def source_epochs(
    sources: Sequence[SourceConfig], trained: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """The passes over each source; empty when every row comes once."""
    shares = [source.share for source in sources]
    epochs = mixture_epochs(shares, {name: counts["tokens"] for name, counts in trained.items()})
    return {} if all(passes == 1 for passes in epochs.values()) else epochs
