"""What a task leaves behind when it is done, as JSON: of a filtered unit, of a packed one, of a group of units."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from llada.data.outcomes import Report
from llada.data.tokens.manifest import ShardEntry
from llada.data.work.units import Unit
from llada.files import read_bytes, write_bytes

Inputs = list[list[str]]
"""[[name, identity], ...] of the files of a unit's parts."""


class FilterCounts(TypedDict):
    """What one unit adds to the deduplication."""

    documents: int
    rows: int
    """Keys to compare."""
    fingerprint: int
    """Adds up over units, whatever their order: tells the deduplication whether it looks at the same documents."""


@dataclass(frozen=True)
class FilteredUnit:
    """Of documents/<name>.parquet."""

    counts: FilterCounts
    inputs: Inputs
    report: Report

    def write(self, url: str) -> None:
        write_bytes(url, json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, url: str) -> FilteredUnit | None:
        """None when the unit is not done."""
        if (fields := read_json(url)) is None:
            return None
        return cls(fields["counts"], fields["inputs"], Report(**fields["report"]))


@dataclass(frozen=True)
class PackedUnit:
    """Of a unit's shards."""

    name: str
    inputs: Inputs
    report: Report
    shards: list[ShardEntry]

    def write(self, url: str) -> None:
        fields = asdict(self)
        fields["shards"] = [shard.to_json() for shard in self.shards]
        for shard in fields["shards"]:
            del shard["source"]  # the unit's
        write_bytes(url, json.dumps(fields).encode())

    @classmethod
    def read(cls, url: str) -> PackedUnit | None:
        """None when the unit is not done."""
        if (fields := read_json(url)) is None:
            return None
        report = Report(**fields["report"])
        shards = [ShardEntry(**shard, source=report.source) for shard in fields["shards"]]
        return cls(fields["name"], fields["inputs"], report, shards)


def unit_inputs(unit: Unit) -> Inputs:
    return [[part.file.name, part.file.identity] for part in unit.parts]


def write_list(url: str, entries: Sequence[Report | ShardEntry]) -> None:
    """Write reports or shards of a group of units."""
    fields = [entry.to_json() if isinstance(entry, ShardEntry) else asdict(entry) for entry in entries]
    write_bytes(url, json.dumps(fields).encode())


def read_json(url: str) -> dict[str, Any] | None:
    """A JSON object, or None when it is not there or not whole."""
    try:
        data = read_bytes(url)
    except FileNotFoundError:
        return None
    try:
        return json.loads(data)
    except ValueError:
        return None
