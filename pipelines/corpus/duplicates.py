"""The deduplication of a snapshot on the cluster: the steps of llada.data.dedup.steps as tasks, and what they leave behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llada.data.dedup.steps import DedupPlan, Index, deduplicate, open_index, plan_dedup, units_per_group
from llada.data.dedup.steps import Kind as DedupKind
from llada.data.work.config import PrepareConfig
from llada.data.work.job import Job, PackJob, Removals
from llada.data.work.results import FilterCounts
from llada.data.work.tasks import LineCounts, line_unit, remove_documents
from llada.files import exists, filesystem, write_bytes
from pipelines.corpus.snapshots import Finished
from pipelines.runners.tasks import TaskRun
from pipelines.stage.artifact import config_hash


@dataclass(frozen=True)
class Comparable:
    """What all units have to compare."""

    rows: int
    """Keys to compare."""
    largest_group: int
    """Those of the group of units that has most."""
    fingerprint: int = 0
    """Of documents: equal when the same ones passed."""


def count_rows(
    run: TaskRun, label: str, task: Callable[[int], FilterCounts | LineCounts], units: int
) -> Comparable:
    """Run task(unit) for all units, a barrier; what they have to compare."""
    total, of_group = Counter[str](), Counter[int]()
    group = units_per_group(units)
    for number, counts in run.map(label, task, range(units)):
        total.update(counts)
        of_group[number // group] += counts["rows"]
    return Comparable(total["rows"], max(of_group.values()), total["fingerprint"])


def find_removals(
    run: TaskRun, job: Job, tokenizer_hash: str, filtered: Comparable, earlier: Sequence[Finished]
) -> Removals:
    """What is to be removed of all units, that are filtered."""
    dedup, units = job.config.dedup, job.plan.units
    ids = [finished.dedup_id for finished in earlier]
    dedup_id = config_hash({"plan": job.plan.id, "documents": filtered.fingerprint, "earlier": ids})
    documents = lines = None
    if dedup.exact or dedup.fuzzy:
        packing = job.packing(tokenizer_hash, Removals(dedup_id))
        documents = _find_duplicates(run, packing, "documents", filtered, earlier)
    if dedup.lines:
        packing = job.packing(tokenizer_hash, Removals(dedup_id, documents))
        counted = count_rows(run, "lines", partial(line_unit, packing), units)
        lines = _find_duplicates(run, packing, "lines", counted, earlier)
    return Removals(dedup_id, documents, lines)


def _find_duplicates(
    run: TaskRun, job: PackJob, kind: DedupKind, counted: Comparable, earlier: Sequence[Finished]
) -> DedupPlan:
    """Deduplicate against the snapshots so far; how the work was divided."""
    config = job.config.dedup
    indexes: list[Index] = []
    for finished in earlier:
        url = finished.snapshot.dedup_index_url(finished.dedup_id, kind)
        indexes.append(open_index(url, kind, config))
    planned = partial(
        plan_dedup,
        kind,
        job.plan.units,
        counted.rows,
        largest_group=counted.largest_group,
        rows_per_task=config.rows_per_task,
    )
    plan = planned(config.partitions)
    # A task reads its partition of every index, however little is new.
    if (most := max((index.partitions for index in indexes), default=0)) > plan.partitions:
        plan = planned(most)

    def on_ray(task: Callable[[int], int], numbers: Sequence[int]) -> Iterable[int]:
        return (result for _, result in run.map(f"dedup {kind}", task, numbers))

    urls = KeysUrls(job, kind)
    deduplicate(urls, job.dedup_folder(kind), plan, config, earlier=indexes, map_tasks=on_ray)
    return plan


def left_to_clean(config: PrepareConfig, earlier: Sequence[Finished]) -> list[PackJob]:
    """The finished snapshots' jobs that were interrupted between their manifest and the end of `clean_up`."""
    jobs: list[PackJob] = []
    if not config.deduplicates or config.keep_documents:
        return jobs
    for finished in earlier:
        plan = finished.read_plan()
        if plan is not None and not exists(finished.snapshot.cleaned_url):
            job = Job(config, finished.snapshot, plan, finished.resources_hash)
            jobs.append(job.packing(finished.dataset.tokenizer_hash, Removals(finished.dedup_id)))
    return jobs


def clean_up(run: TaskRun, job: PackJob) -> None:
    """Delete what the deduplication needed and wrote on its way; its index stays for later snapshots."""
    run.step("clean up", partial(remove_documents, job), range(job.plan.groups))
    fs, path = filesystem(job.snapshot.dedup_url)
    for kind in fs.ls(path, detail=False):
        for step in fs.ls(kind, detail=False):
            if job.removals.dedup_id not in kind or not step.rstrip("/").endswith("/index"):
                fs.rm(step, recursive=True)
    write_bytes(job.snapshot.cleaned_url, b"{}")


class KeysUrls(Sequence[str]):
    """The keys' URLs of all units, made when they are asked for."""

    def __init__(self, job: PackJob, kind: DedupKind) -> None:
        self.job, self.kind = job, kind

    def __len__(self) -> int:
        return self.job.plan.units

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        return self.job.keys_url(self.kind, self.job.plan.unit(place))
