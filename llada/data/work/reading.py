"""One pass over the input of a work unit: what the steps of it need, and what they fill."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from llada.data.dedup.decontaminate import Decontamination, DecontaminationIndex
from llada.data.filters.chain import FilterChain
from llada.data.outcomes import Rejects, Report
from llada.data.read.dialogues import read_dialogues
from llada.data.read.documents import DocumentsOf, read_documents
from llada.data.work.job import Job
from llada.data.work.read_config import ReadConfig
from llada.data.work.units import Unit
from llada.files import write_bytes


@dataclass(frozen=True)
class Reading:
    """A pass over a unit, without the parts whose labels are in `skip`."""

    job: Job
    unit: Unit
    skip: frozenset[str] = frozenset()
    report: Report = field(default_factory=Report)
    rejects: Rejects = field(default_factory=Rejects)

    @classmethod
    def of(cls, job: Job, unit: Unit, skip: frozenset[str] = frozenset()) -> Reading:
        return cls(job, unit, skip, Report(unit.source, 1, unit.size))

    @property
    def config(self) -> ReadConfig:
        """Of the unit's source."""
        return self.job.config.read_of(self.unit.source)

    @property
    def is_dialogues(self) -> bool:
        return self.job.config.kind != "pretrain"

    @property
    def documents_of(self) -> DocumentsOf:
        """What a record is: a text, or a dialogue."""
        return read_dialogues if self.is_dialogues else read_documents

    @property
    def filters(self) -> FilterChain:
        """The filters of the source and, last, the decontamination."""
        filters = self.config.chain()
        if self.job.config.decontamination.files:
            index = _load_index(self.job.snapshot.evaluation_index_url, self.job.resources_hash)
            filters.append(Decontamination(index, self.report.matches))
        return FilterChain(filters)

    def finish(self, unreadable: Mapping[str, str], name: str) -> Report:
        """The report, complete: with {label: why} of the parts that could not be read. The rejected records are put into quarantine under `name`."""
        self.report.rejected = dict(sorted(self.rejects.counts.items()))
        self.report.skipped = dict(sorted(self.rejects.skipped.items()))
        self.report.left_out = self.rejects.left_out
        self.report.unreadable_files = list(unreadable)
        for kind, number in self.rejects.edits.items():
            self.report.add_edits(kind, number)
        self.report.file_problems |= self.rejects.file_problems() | dict(unreadable)
        if examples := self.rejects.examples:
            lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
            write_bytes(self.job.quarantine_url(name), lines.encode())
        return self.report


@functools.lru_cache(maxsize=1)
def _load_index(url: str, resources_hash: str) -> DecontaminationIndex:
    """Once per worker process; the hash tells a later index at the same place apart."""
    return DecontaminationIndex.load(url)
