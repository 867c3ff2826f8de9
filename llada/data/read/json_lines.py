"""JSON lines: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator

from llada.data.outcomes import Rejects
from llada.data.read.parts import Part, Reader, ReadOptions, Record
from llada.data.read.stream import read_texts


def read_json_lines(part: Part, options: ReadOptions, rejects: Rejects) -> Iterator[Record]:
    """The objects of a part. Rejected: "invalid_json", "not_an_object", and what `read_texts` rejects."""
    for line, text in read_texts(
        part, b"\n", options.max_record_bytes, rejects, encoding=options.encoding, opening=b"{"
    ):
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            rejects.add("invalid_json", part.label, line, text)
            continue
        if isinstance(fields, dict):
            yield Record(fields, line)
        else:
            rejects.add("not_an_object", part.label, line, text)


JSON_LINES = Reader(
    (".jsonl", ".ndjson"),
    read_json_lines,
    is_compressible=True,
    is_divisible=True,
    note="one object a line",
)
