"""The deduplication of a snapshot on the cluster: the steps of llada.data.dedup.steps as tasks, and what they leave behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from llada.data.dedup.steps import Index, deduplicate, open_index, plan_dedup, units_per_group
from llada.data.dedup.steps import Kind as DedupKind
from llada.data.dedup.steps import Plan as DedupPlan
from llada.data.work.group_tasks import remove_documents
from llada.data.work.job import Job, PrepareConfig, dedup_folder
from llada.data.work.read_tasks import filter_unit, line_unit
from llada.data.work.units import read_plan
from llada.files import exists, filesystem, join, write_bytes
from pipelines.corpus.snapshots import snapshot_url
from pipelines.runners.tasks import TaskRun
from pipelines.stage.artifact import config_hash


def find_all_duplicates(run: TaskRun, earlier: Sequence[dict[str, Any]]) -> Job:
    """Read and filter all units, and find what of them is to be removed; the job that knows it."""
    job, dedup = run.job, run.job.config.dedup
    found, largest = _count_rows(run, "read", filter_unit)
    ids = [manifest["counts"]["dedup_id"] for manifest in earlier]
    dedup_id = config_hash({"plan": job.plan.id, "documents": found["fingerprint"], "earlier": ids})
    job = run.job = replace(job, dedup_id=dedup_id)
    if dedup.exact or dedup.fuzzy:
        job = run.job = replace(
            job, documents_dedup=_find_duplicates(run, "documents", found["rows"], largest, ids)
        )
    if dedup.lines:
        found, largest = _count_rows(run, "lines", line_unit)
        job = run.job = replace(job, lines_dedup=_find_duplicates(run, "lines", found["rows"], largest, ids))
    return job


def _count_rows(
    run: TaskRun, label: str, function: Callable[[Job, int], dict[str, int]]
) -> tuple[Counter[str], int]:
    """Run function(job, unit) for all units; (the sum of what they return, the most "rows" of a group of units)."""
    total, of_group = Counter[str](), Counter[int]()
    group = units_per_group(run.job.plan.units)
    for number, counts in run.map(label, partial(function, run.job), range(run.job.plan.units)):
        total.update(counts)
        of_group[number // group] += counts["rows"]
    return total, max(of_group.values())


def _find_duplicates(
    run: TaskRun, kind: DedupKind, rows: int, largest_group: int, earlier: Sequence[str]
) -> DedupPlan:
    """Deduplicate against `earlier`, the dedup ids of the snapshots so far; how the work was divided."""
    job, config = run.job, run.job.config.dedup
    indexes: list[Index] = []
    for number, dedup_id in enumerate(earlier):
        folder = dedup_folder(snapshot_url(job.output, number), dedup_id, kind)
        indexes.append(open_index(join(folder, "index"), kind, config))
    planned = partial(
        plan_dedup,
        kind,
        job.plan.units,
        rows,
        largest_group=largest_group,
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


def left_to_clean(config: PrepareConfig, output: str, earlier: Sequence[dict[str, Any]]) -> list[Job]:
    """The finished snapshots' jobs that were interrupted between their manifest and the end of `clean_up`."""
    jobs: list[Job] = []
    if not config.deduplicates or config.keep_documents:
        return jobs
    for number, manifest in enumerate(earlier):
        folder = snapshot_url(output, number)
        plan = read_plan(join(folder, "plan"))
        if plan is not None and not exists(join(folder, "clean.json")):
            hashes = manifest["counts"]["resources_hash"], manifest["dataset"]["tokenizer_hash"]
            jobs.append(Job(config, output, folder, plan, *hashes, dedup_id=manifest["counts"]["dedup_id"]))
    return jobs


def clean_up(run: TaskRun) -> None:
    """Delete what the deduplication needed and wrote on its way; its index stays for later snapshots."""
    job = run.job
    run.step("clean up", remove_documents, range(job.plan.groups))
    fs, path = filesystem(join(job.snapshot, "dedup"))
    for kind in fs.ls(path, detail=False):
        for step in fs.ls(kind, detail=False):
            if job.dedup_id not in kind or not step.rstrip("/").endswith("/index"):
                fs.rm(step, recursive=True)
    write_bytes(join(job.snapshot, "clean.json"), b"{}")


class KeysUrls(Sequence[str]):
    """The keys' URLs of all units, made when they are asked for."""

    def __init__(self, job: Job, kind: DedupKind) -> None:
        self.job, self.kind = job, kind

    def __len__(self) -> int:
        return self.job.plan.units

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        return self.job.keys_url(self.kind, self.job.plan.unit(place))
