"""Work units: the pieces of the input that one task reads, of about equal size, with names that identify their content.

Large uncompressed JSON lines are cut by bytes and parquet by row groups; compressed files and texts stay whole;
neighbouring small files share a unit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from llada.data.documents import InputFile, Part, file_format
from llada.data.files import filesystem


@dataclass(frozen=True)
class Unit:
    """Work for one task: parts of input files. `size` is in bytes."""

    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def name(self, settings: Mapping[str, Any], tokenizer_hash: str) -> str:
        """The stem of the unit's output files: readable, and different when input, settings or tokenizer differ.

        The inputs' place is left out, so that a moved corpus gives the same shards; `identity` is left to the report.
        """
        described = [[p.file.name, p.file.size, p.start, p.end] for p in self.parts]
        text = json.dumps([described, settings, tokenizer_hash], sort_keys=True)
        stem = re.sub(r"[^A-Za-z0-9]+", "-", os.path.basename(self.parts[0].file.name).split(".")[0])[
            :40
        ].strip("-")
        return f"{stem or 'unit'}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def plan_units(files: Sequence[InputFile], unit_bytes: int) -> list[Unit]:
    """Units of about `unit_bytes` each, in the order of `files`: a large file is cut, neighbouring small ones share a unit."""
    units: list[Unit] = []
    group: list[Part] = []
    for part in (part for file in files for part in _cut(file, unit_bytes)):
        if group and sum(p.size for p in group) + part.size > unit_bytes:
            units.append(Unit(tuple(group)))
            group = []
        group.append(part)
    return [*units, Unit(tuple(group))] if group else units


def _cut(file: InputFile, unit_bytes: int) -> Iterator[Part]:
    kind, compression = file_format(file.url)
    if file.size <= unit_bytes or compression or kind == "text":
        yield Part(file, file.size)
    elif kind == "jsonl":
        for start in range(0, file.size, unit_bytes):
            yield Part(file, min(unit_bytes, file.size - start), start, start + unit_bytes)
    else:
        yield from _cut_parquet(file, unit_bytes)


def _cut_parquet(file: InputFile, unit_bytes: int) -> Iterator[Part]:
    fs, path = filesystem(file.url)
    try:
        with fs.open(path, "rb") as stream:
            metadata = pq.ParquetFile(stream).metadata
    except (OSError, ValueError):  # damaged: the unit that reads it counts the loss
        yield Part(file, file.size)
        return
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += sum(
            metadata.row_group(group).column(c).total_compressed_size for c in range(metadata.num_columns)
        )
        if size >= unit_bytes or group == metadata.num_row_groups - 1:
            yield Part(file, size, start, group + 1)
            start, size = group + 1, 0
