"""Leave out of a unit's documents what stands in the corpus before: whole documents, and lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llada.data.dedup.steps import DedupPlan, read_removals, remove_lines
from llada.data.document import Document
from llada.data.outcomes import Report


@dataclass(frozen=True)
class Repeats:
    """What goes of the documents of one unit, by their positions in it."""

    documents: Mapping[int, int] = field(default_factory=dict)
    """{position: id of the document that stays for it (see steps.py), 0 in an earlier snapshot}"""
    lines: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """{position: numbers of its lines}"""


def repeated_documents(folder: str, plan: DedupPlan, unit: int) -> dict[int, int]:
    """The `Repeats.documents` of a unit, as `deduplicate` found them."""
    positions, roots = read_removals(folder, plan, unit)
    return dict(zip(positions.tolist(), roots.tolist(), strict=True))


def repeated_lines(folder: str, plan: DedupPlan, unit: int) -> dict[int, list[int]]:
    """The `Repeats.lines` of a unit, as `deduplicate` found them."""
    lines: dict[int, list[int]] = {}
    for position, number in zip(*read_removals(folder, plan, unit), strict=True):
        lines.setdefault(int(position), []).append(int(number))
    return lines


def drop_repeats(
    documents: Iterable[Document], repeats: Repeats, min_chars: int, report: Report
) -> Iterator[Document]:
    """The documents of a unit, from its first on, that stand in the corpus for the first time, without the lines that
    do not. One of which less than `min_chars` stay goes as a whole."""
    for position, document in enumerate(documents):
        root = repeats.documents.get(position)
        if root is not None:
            report.add("duplicate" if root else "duplicate_of_earlier_snapshot", document, root or None)
            continue
        if numbers := repeats.lines.get(position, ()):
            report.add_edits("duplicate_lines", len(numbers))
            rest = remove_lines(document.text, np.array(numbers)).strip("\n")
            if len(rest) < max(1, min_chars):
                report.add("duplicate_lines", document, len(numbers))
                continue
            document = replace(document, text=rest)
        yield document
