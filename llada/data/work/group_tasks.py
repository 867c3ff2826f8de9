"""Tasks over a group of work units: add their reports and shards up, delete what only the deduplication needed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from llada.data.outcomes import Report, merge
from llada.data.work.job import Job
from llada.data.work.units import Unit
from llada.files import filesystem, join, read_bytes, write_bytes

_READERS = 16


def merge_group(job: Job, group: int) -> int:
    """Add up the reports, shards and unigram counts of a group of units; returns its units."""
    units = job.plan.group(group)
    by_source: dict[str, Report] = {}
    shards: list[dict[str, Any]] = []
    totals = np.zeros(0, dtype=np.int64)
    with ThreadPoolExecutor(_READERS) as pool:
        for begin in range(0, len(units), _READERS):  # a few at a time: counts take a megabyte each
            some = units[begin : begin + _READERS]
            for unit, (entry, counts) in zip(some, pool.map(partial(_read_unit, job), some), strict=True):
                report = Report(**entry["report"])
                held = by_source.get(unit.source)
                by_source[unit.source] = merge([held, report] if held else [report])
                shards += [{**shard, "source": unit.source} for shard in entry["shards"]]
                missing = int(counts["ids"].max(initial=-1)) + 1 - len(totals)
                totals = np.pad(totals, (0, max(0, missing)))
                totals[counts["ids"]] += counts["counts"]
    seen = np.flatnonzero(totals)
    reports = [asdict(report) for report in by_source.values()]
    write_bytes(_group_url(job, group, "unigrams"), save({"ids": seen, "counts": totals[seen]}))
    write_bytes(_group_url(job, group, "shards"), json.dumps(shards).encode())
    write_bytes(_group_url(job, group, "reports"), json.dumps(reports).encode())
    return len(units)


def _read_unit(job: Job, unit: Unit) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The report of a packed unit, and how often each token is trained on in it."""
    stem = join(job.output, "units", job.shards_name(unit))
    return json.loads(read_bytes(f"{stem}.json")), load(read_bytes(f"{stem}.unigrams"))


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
