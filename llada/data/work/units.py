"""Work units: the pieces of the input that one task reads, of about equal size, with names that identify their content.

Large uncompressed files are cut by bytes where their format allows it (JSON lines, parquet); others stay whole;
neighbouring small files share a unit. The units of a run are written down in files of 256 (a group), so that nobody
holds them all:
    <folder>/000000.jsonl, ...   a unit per line        plan.json  {units, groups, files, bytes, ...}, written last
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llada.data.left_out import FilesLeftOut
from llada.data.read.formats import is_divisible
from llada.data.read.parts import InputFile, Part
from llada.files import join, read_bytes, write_bytes

UNITS_PER_GROUP = 256


@dataclass(frozen=True)
class Unit:
    """Work for one task: parts of input files of one source. `size` is in bytes."""

    parts: tuple[Part, ...]
    source: str = ""

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def name(self, *settings: Any) -> str:
        """The stem of the unit's output files: readable, and different when the input or any of `settings` differ.

        The inputs' place is left out, so that a moved corpus gives the same shards; `identity` is left to the report.
        """
        described = [[p.file.name, p.file.size, p.start, p.end] for p in self.parts]
        text = json.dumps([self.source, described, settings], sort_keys=True)
        stem = re.sub(r"[^A-Za-z0-9]+", "-", os.path.basename(self.parts[0].file.name).split(".")[0])
        return f"{stem[:40].strip('-') or 'unit'}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Plan:
    """What plan.json holds: how much there is to do, and an `id` that is equal when the units are."""

    folder: str
    units: int
    files: int
    bytes: int
    id: str
    inputs: str = ""
    """Names what was listed, for a caller who goes on with the plan."""
    left_out: FilesLeftOut = field(default_factory=dict)
    """What stood among the input and is not read."""

    @property
    def groups(self) -> int:
        return -(-self.units // UNITS_PER_GROUP)

    def unit(self, index: int) -> Unit:
        """Unit `index`; its whole group is read and kept."""
        return _read_group(self.folder, index // UNITS_PER_GROUP, self.id)[index % UNITS_PER_GROUP]

    def group(self, index: int) -> tuple[Unit, ...]:
        """The units of one group."""
        return _read_group(self.folder, index, self.id)


class SeenFiles:
    """The files of earlier plans, 16 bytes each."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        hashes = (
            number
            for plan in plans
            for group in range(plan.groups)
            for unit in plan.group(group)
            for part in unit.parts
            for number in (_name_hash(unit.source, part.file), _version_hash(unit.source, part.file))
        )
        names, versions = np.fromiter(hashes, dtype=np.uint64).reshape(-1, 2).T
        self._names, self._versions = np.unique(names), np.unique(versions)

    def is_known(self, source: str, file: InputFile) -> bool:
        """Whether this version of the file was in a plan."""
        return _contains(self._versions, _version_hash(source, file))

    def is_changed(self, source: str, file: InputFile) -> bool:
        """Whether another version of it was."""
        return _contains(self._names, _name_hash(source, file)) and not self.is_known(source, file)


def write_plan(
    folder: str,
    parts: Iterable[tuple[str, Part]],
    unit_bytes: int,
    inputs: str = "",
    left_out: FilesLeftOut | None = None,
) -> Plan | None:
    """Write the units of (source, part)s, as they come, and then plan.json; None, and no plan, without any part.
    `left_out` may fill while the parts come."""
    units = files = size = 0
    digest = hashlib.sha256()

    def counted() -> Iterator[tuple[str, Part]]:
        nonlocal files, size
        for source, part in parts:
            files += part.start == 0
            size += part.size
            yield source, part

    group: list[str] = []

    def flush() -> None:
        write_bytes(_group_url(folder, (units - 1) // UNITS_PER_GROUP), "".join(group).encode())
        group.clear()

    for unit in plan_units(counted(), unit_bytes):
        group.append(json.dumps(asdict(unit)) + "\n")
        digest.update(unit.name().encode())  # not the place: a moved corpus is the same
        units += 1
        if len(group) == UNITS_PER_GROUP:
            flush()
    if group:
        flush()
    if not units:
        return None
    plan = Plan(folder, units, files, size, digest.hexdigest()[:16], inputs, left_out or {})
    stored = {name: getattr(plan, name) for name in ("units", "files", "bytes", "inputs", "left_out", "id")}
    write_bytes(join(folder, "plan.json"), json.dumps(stored).encode())
    return plan


def read_plan(folder: str) -> Plan | None:
    """The plan in a folder, or None when it is not there or not complete."""
    try:
        return Plan(folder, **json.loads(read_bytes(join(folder, "plan.json"))))
    except FileNotFoundError:
        return None


def plan_units(parts: Iterable[tuple[str, Part]], unit_bytes: int) -> Iterator[Unit]:
    """Units of about `unit_bytes` each, in the order of the (source, part)s: neighbouring small ones of one source
    share a unit."""
    waiting: list[Part] = []
    source = ""
    for new_source, part in parts:
        if waiting and (new_source != source or sum(p.size for p in waiting) + part.size > unit_bytes):
            yield Unit(tuple(waiting), source)
            waiting = []
        waiting.append(part)
        source = new_source
    if waiting:
        yield Unit(tuple(waiting), source)


def cut_file(file: InputFile, unit_bytes: int) -> Iterator[Part]:
    """The parts of a file, each at most `unit_bytes` where the format allows it."""
    if file.size is None:
        yield Part(file, unit_bytes)
        return
    if file.size <= unit_bytes or not is_divisible(file.url):
        yield Part(file, file.size)
        return
    for start in range(0, file.size, unit_bytes):
        yield Part(file, min(unit_bytes, file.size - start), start, start + unit_bytes)


def _group_url(folder: str, group: int) -> str:
    return join(folder, f"{group:06d}.jsonl")


@functools.lru_cache(maxsize=2)
def _read_group(folder: str, group: int, plan_id: str) -> tuple[Unit, ...]:
    lines = read_bytes(_group_url(folder, group)).decode().splitlines()
    return tuple(_parse_unit(json.loads(line)) for line in lines)


def _parse_unit(fields: Mapping[str, Any]) -> Unit:
    parts = (Part(**{**part, "file": InputFile(**part["file"])}) for part in fields["parts"])
    return Unit(tuple(parts), fields["source"])


def _name_hash(source: str, file: InputFile) -> int:
    return _hash(f"{source}\0{file.name}")


def _version_hash(source: str, file: InputFile) -> int:
    return _hash(f"{source}\0{file.name}\0{file.identity}")


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _contains(values: np.ndarray, wanted: int) -> bool:
    place = int(np.searchsorted(values, np.uint64(wanted)))
    return place < len(values) and int(values[place]) == wanted
