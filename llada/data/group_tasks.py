"""Tasks over a group of work units: add their reports and shards up, delete what only the deduplication needed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from llada.data.files import filesystem, join, read_bytes, write_bytes
from llada.data.prepare import Job, read_report
from llada.data.reports import Report, merge

_STAT_THREADS = 16


def merge_group(job: Job, group: int) -> int:
    """Add up the reports, shards and unigram counts of a group of units; returns its units."""
    units = job.plan.group(group)
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        names = [job.shards_name(unit) for unit in units]
        found = list(pool.map(lambda n: read_report(join(job.output, "units", f"{n}.json")), names))
        counts = list(pool.map(lambda n: load(read_bytes(join(job.output, "units", f"{n}.unigrams"))), names))
    by_source: dict[str, list[Report]] = {}
    shards = []
    for unit, entry in zip(units, found, strict=True):
        assert entry is not None  # pack_unit has run
        by_source.setdefault(unit.source, []).append(Report(**entry["report"]))
        shards += [{**shard, "source": unit.source} for shard in entry["shards"]]
    ids = np.concatenate([entry["ids"] for entry in counts])
    seen, place = np.unique(ids, return_inverse=True)
    totals = np.zeros(len(seen), dtype=np.int64)
    np.add.at(totals, place, np.concatenate([entry["counts"] for entry in counts]))
    reports = [asdict(merge(reports)) for reports in by_source.values()]
    write_bytes(_group_url(job, group, "unigrams"), save({"ids": seen, "counts": totals}))
    write_bytes(_group_url(job, group, "shards"), json.dumps(shards).encode())
    write_bytes(_group_url(job, group, "reports"), json.dumps(reports).encode())
    return len(units)


def group_reports(job: Job, group: int) -> list[Report]:
    """A report for each source of a merged group."""
    return [Report(**report) for report in json.loads(read_bytes(_group_url(job, group, "reports")))]


def group_shards(job: Job, group: int) -> list[dict[str, Any]]:
    """The shards of a merged group in corpus order, each with its split and source."""
    return json.loads(read_bytes(_group_url(job, group, "shards")))


def group_unigrams(job: Job, group: int, size: int) -> np.ndarray:
    """int64 (size,): how often each token is trained on in the train rows of a merged group."""
    stored = load(read_bytes(_group_url(job, group, "unigrams")))
    counts = np.zeros(size, dtype=np.int64)
    counts[stored["ids"]] = stored["counts"]
    return counts


def _group_url(job: Job, group: int, what: str) -> str:
    return join(job.snapshot, "groups", f"{group:06d}.{what}")


def remove_documents(job: Job, group: int) -> int:
    """Delete what the deduplication needed of a group's units; returns its units."""
    fs, _ = filesystem(job.output)
    for unit in job.plan.group(group):
        stem = join(job.output, "documents", job.documents_name(unit))
        for url in (
            f"{stem}.parquet",
            job.keys_url("documents", unit),
            job.keys_url("lines", unit),
            job.keys_url("lines", unit) + ".json",
            f"{stem}.json",
        ):
            path = fs._strip_protocol(url)
            if fs.exists(path):
                fs.rm_file(path)
    return len(job.plan.group(group))
