"""The end of a snapshot: add the groups of units up, check the sums, write what training reads and the report."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from llada.data.dedup.clusters import Clusters, read_clusters
from llada.data.dedup.decontaminate import Coverage, DecontaminationIndex
from llada.data.dedup.steps import locate
from llada.data.document import Document
from llada.data.left_out import FilesLeftOut, added, summary
from llada.data.outcomes import KEPT, SAMPLE_CHARS, Report, merge
from llada.data.report.facts import Run
from llada.data.report.page import render_report
from llada.data.tokens.manifest import DatasetEntry, FileEntry, SplitEntry, file_entry, write_index
from llada.data.tokens.shards import UNIGRAM_COUNTS, load_unigram_counts, write_unigram_counts
from llada.data.tokens.splits import SPLITS
from llada.data.work.config import PrepareConfig, SourceConfig
from llada.data.work.job import PackJob
from llada.data.work.store import stored_document
from llada.data.work.tasks import group_reports, group_shards, group_unigrams
from llada.data.work.units import Plan
from llada.errors import UserError
from llada.files import file_sizes, filesystem, join, read_bytes, write_bytes
from llada.tokenizer import vocab_size
from pipelines.corpus.snapshots import Finished, file_of, publish, source_epochs, still_unread
from pipelines.stage.artifact import Manifest, Output, fetch_folder, put_folder
from pipelines.stage.tracking import Tracker

_log = logging.getLogger(__name__)
_DUPLICATE = "duplicate"
Counts = Mapping[str, int]


@dataclass(frozen=True)
class Totals:
    """The sums over all units of a snapshot."""

    by_source: dict[str, Report]
    all: Report
    unigrams: np.ndarray
    """int64 (vocabulary,): how often each token is trained on; of all snapshots."""


def finish_snapshot(
    folder: Output,
    job: PackJob,
    sources: Sequence[SourceConfig],
    earlier: Sequence[Finished],
    tokenizer: PreTrainedTokenizerFast,
    tracker: Tracker | None,
    *,
    preset: str | None = None,
    begun: float | None = None,
) -> Manifest:
    """Write all that makes the snapshot complete, its manifest last; the manifest. `begun` is when its run began, by
    time.monotonic(). Raises UserError when the result would be no good."""
    newest = earlier[-1] if earlier else None
    totals = add_up(job, newest, vocab_size(tokenizer))
    for report in totals.by_source.values():
        check_tokenizer(report, job.config.max_lost_text_fraction)
    check(job, totals.all, is_first=not earlier)
    clusters = None
    if job.removals.documents is not None:
        clusters = read_clusters(job.dedup_folder("documents"))
    splits = {split: _split_entry(job, split, totals.all.splits[split], newest) for split in SPLITS}
    trained = _trained(totals.by_source, newest)
    dataset = DatasetEntry.of(
        tokenizer,
        kind=job.config.kind,
        row_length=job.config.row_length,
        packing=job.config.packing,
        tokenizer_hash=job.tokenizer_hash,
        root="../..",
        splits=splits,
        sources=trained,
        epochs=source_epochs(sources, trained),
    )
    if not splits["validation"].rows:
        _log.warning(
            "no row is held out for validation: training on this data cannot tell whether it learns more than the text; "
            "raise validation_fraction, or set read.section_chars to cut long documents"
        )
    files = write_files(job, totals.unigrams)
    manifest = folder.describe(
        describe_counts(job, totals, clusters, splits, newest),
        kind="tokens",
        files=files,
        mlflow_run_id=tracker.wait_started() if tracker else None,
        dataset=dataset.to_json(),
    )
    run = Run(
        job.output,
        job.snapshot.name,
        manifest["created_at"],
        preset,
        manifest["git_commit"],
        time.monotonic() - begun if begun else 0.0,
    )
    write_report(job, totals, clusters, dataset, run)
    return publish(manifest, job.snapshot)


# --- Sums -------------------------------------------------------------------------------------------------------------


def add_up(job: PackJob, newest: Finished | None, vocabulary: int) -> Totals:
    """The sums over the groups; the unigram counts go on from those of the newest snapshot."""
    unigrams = np.zeros(vocabulary, dtype=np.int64)
    by_source: dict[str, Report] = {}
    for group in range(job.plan.groups):
        unigrams += group_unigrams(job, group, vocabulary)
        for report in group_reports(job, group):
            total = by_source.get(report.source)
            by_source[report.source] = merge([total, report] if total else [report])
    if newest:
        unigrams += load_unigram_counts(newest.snapshot.url)
    return Totals(by_source, merge(by_source.values()), unigrams)


def _split_entry(job: PackJob, split: str, own: Counts, newest: Finished | None) -> SplitEntry:
    """A split with what it holds of earlier snapshots."""
    name = job.snapshot.index_name(split)
    if newest is None:
        return SplitEntry(**own, indexes=(name,))
    before = newest.dataset.splits[split]
    return SplitEntry(
        documents=(before.documents or 0) + own["documents"],
        rows=before.rows + own["rows"],
        tokens=before.tokens + own["tokens"],
        indexes=(*(newest.snapshot.beside(index) for index in before.indexes), name),
    )


def _trained(by_source: Mapping[str, Report], newest: Finished | None) -> dict[str, dict[str, int]]:
    """{source: {documents, rows, tokens} of its train split}, with those of earlier snapshots."""
    trained = {name: dict(report.splits["train"]) for name, report in by_source.items()}
    for name, counts in ((newest.dataset.sources or {}) if newest else {}).items():
        own = trained.get(name, {})
        trained[name] = {unit: number + own.get(unit, 0) for unit, number in counts.items()}
    return trained


def check(job: PackJob, total: Report, *, is_first: bool) -> None:
    """Raise UserError when the result would be no good; warn about what was lost."""
    try:
        _check(job.config, total, job.plan, job.output, is_first=is_first)
    except UserError:
        # The remedies change the input: list it again next time. What was read is kept for what stays the same.
        fs, path = filesystem(join(job.plan.folder, "plan.json"))
        fs.rm_file(path)
        raise


def _check(config: PrepareConfig, total: Report, plan: Plan, output: str, *, is_first: bool) -> None:
    lost, refused = Counter(total.rejected), total.refused()
    seen = total.documents() + lost.total()
    if lost.total() > config.max_invalid_fraction * seen:
        raise UserError(
            f"{lost.total():,} of {seen:,} records cannot be used ({reasons(lost + refused)}"
            f"{_first_problem(total)}); see {join(output, 'quarantine')}, mend the input, or raise max_invalid_fraction"
        )
    unread = {file_of(label) for label in total.unreadable_files}
    if len(unread) > max(1, config.max_unreadable_fraction * plan.files):  # a single one never stops a run
        first = min(total.unreadable_files)
        why = total.file_problems.get(first)
        raise UserError(
            f"{len(unread):,} of {plan.files:,} files could not be read, {min(unread)} among them; "
            "run again when they can, or raise max_unreadable_fraction"
            + (f" ({first}: {why})" if why else "")
        )
    if is_first and not total.splits["train"]["rows"]:
        left_out = all_left_out(lost + Counter(total.skipped) + refused, added(plan.left_out, total.left_out))
        remedy = "check --input and the filters"
        if total.splits["validation"]["rows"]:
            remedy = "all went to validation: set read.section_chars to cut long documents, or lower validation_fraction"
        raise UserError(f"no training rows from {seen:,} records (left out: {left_out}); {remedy}")
    for name in total.damaged_files:
        if name not in total.file_problems:
            _log.warning("damaged, what could be read of it was used: %s", name)
    for name, problem in total.file_problems.items():
        if name not in total.unreadable_files:
            _log.warning("what could be read of it was used: %s: %s", name, problem)
    for name in total.unreadable_files:
        why = total.file_problems.get(name, "its store failed")
        _log.warning("could not be read (%s) and is left out, a later run tries again: %s", why, name)


def check_tokenizer(report: Report, limit: float) -> None:
    """Raise UserError when the tokenizer loses a larger share than `limit` of the source's sampled text."""
    counts = Counter(report.tokenizer)
    if counts["lost_characters"] > limit * counts["characters"]:
        raise UserError(
            f"the tokenizer loses {counts['lost_characters'] / counts['characters']:.1%} of the sampled text"
            + (f" of source {report.source}" if report.source else "")
            + f" ({counts['unknown_tokens']:,} of {counts['tokens']:,} tokens are unknown, {counts['empty_documents']:,} "
            f"of {counts['documents']:,} documents are empty): give a tokenizer that knows this text, or raise "
            "max_lost_text_fraction"
        )


def _first_problem(total: Report) -> str:
    return next((f"; {name}: {problem}" for name, problem in total.file_problems.items()), "")


def all_left_out(records: Counter[str], files: FilesLeftOut) -> str:
    """In a line, the records and documents that were left out, and the files; "none" when nothing was."""
    parts = ([reasons(records)] if records.total() else []) + ([f"files: {summary(files)}"] if files else [])
    return "; ".join(parts) or "none"


def describe_left_out(counts: Mapping[str, Any]) -> str:
    """What the "counts" of a manifest say of all that was not used, by its kind; "none" when all was."""
    files = counts.get("left_out", {})
    kinds = [
        ("files", sum(entry["files"] for entry in files.values()), summary(files)),
        ("records that hold no text", *_summed(counts.get("skipped", {}))),
        ("records that cannot be used", *_summed(counts["rejected"])),
        ("documents", *_summed(counts["filtered"])),
        ("unreadable files", len(unread := counts["unreadable_files"]), ", ".join(unread[:3])),
    ]
    return "; ".join(f"{kind} {number:,}: {named}" for kind, number, named in kinds if number) or "none"


def _summed(counts: Counts) -> tuple[int, str]:
    return sum(counts.values()), reasons(Counter(counts))


def reasons(counts: Counter[str]) -> str:
    """The most frequent reasons why something was left out: "too_short 12, invalid_json 3"."""
    return ", ".join(f"{reason} {number:,}" for reason, number in counts.most_common(4)) or "none"


def describe_counts(
    job: PackJob,
    totals: Totals,
    clusters: Clusters | None,
    splits: Mapping[str, SplitEntry],
    newest: Finished | None,
) -> dict[str, Any]:
    """The "counts" of the manifest: figures of the snapshot, and of its splits those up to it."""
    total = totals.all
    unread = still_unread(job.plan, newest.unreadable_files) if newest else []
    shares = totals.unigrams[totals.unigrams > 0] / totals.unigrams.sum()
    return {
        "plan_id": job.plan.id,
        "dedup_id": job.removals.dedup_id,
        "resources_hash": job.resources_hash,
        "units": job.plan.units,
        "files": job.plan.files,
        "input_bytes": total.input_bytes,
        "documents_read": total.documents(),
        "documents_kept": total.documents(KEPT),
        "records_rejected": sum(total.rejected.values()),
        "rejected": total.rejected,
        "skipped": total.skipped,
        "left_out": added(job.plan.left_out, total.left_out),
        "filtered": dict(sorted(total.refused().items())),
        "edits": total.edits,
        "duplicate_clusters": clusters.number if clusters else 0,
        "largest_duplicate_cluster": clusters.largest[0].size if clusters and clusters.largest else 0,
        "tokenizer_check": {name: report.tokenizer for name, report in totals.by_source.items()},
        "damaged_files": total.damaged_files,
        "unreadable_files": [*unread, *total.unreadable_files],
        **{
            f"{split}_{unit}": getattr(splits[split], unit)
            for split in SPLITS
            for unit in ("documents", "rows", "tokens")
        },
        "unigram_entropy": float(-(shares * np.log(shares)).sum()),  # nats per token of the train split
    }


# --- Files ------------------------------------------------------------------------------------------------------------


def write_files(job: PackJob, unigrams: np.ndarray) -> dict[str, FileEntry]:
    """What training reads beside the shards: unigram counts, the lists of this snapshot's shards, the tokenizer."""
    snapshot = job.snapshot
    files = {UNIGRAM_COUNTS: file_entry(write_unigram_counts(snapshot.url, unigrams))}
    for split in SPLITS:
        name = snapshot.index_name(split)
        groups = (group_shards(job, group) for group in range(job.plan.groups))
        own = (shard for shards in groups for shard in shards if shard.split == split)
        files[name] = write_index(join(snapshot.url, name), own)
    put_folder(fetch_folder(job.tokenizer_url), snapshot.tokenizer_url)
    for name in sorted(file_sizes(snapshot.tokenizer_url)):
        files[join("tokenizer", name)] = file_entry(read_bytes(join(snapshot.tokenizer_url, name)))
    return files


def write_report(
    job: PackJob, totals: Totals, clusters: Clusters | None, dataset: DatasetEntry, run: Run
) -> None:
    """The page report.html, with the texts of the documents that its samples and clusters name."""
    ids: set[int] = set()
    if clusters is not None:
        ids = {number for cluster in clusters.largest for number in cluster.ids}
        for report in totals.by_source.values():
            stayed = (sample["value"] for sample in report.samples.get(_DUPLICATE, []))
            ids.update(number for number in stayed if isinstance(number, int))
    documents = {number: _beginning(job, number) for number in sorted(ids)}
    coverage: Sequence[Coverage] = ()
    if job.config.decontamination.files:
        coverage = DecontaminationIndex.load(job.snapshot.evaluation_index_url).coverage
    page = render_report(
        totals.by_source,
        plan=job.plan,
        config=job.config,
        clusters=clusters,
        documents=documents,
        coverage=coverage,
        dataset=dataset,
        run=run,
    )
    write_bytes(job.snapshot.report_url, page.encode())


def _beginning(job: PackJob, number: int) -> Document:
    """The beginning of a document that was deduplicated, by its id."""
    (unit,), (position,) = locate(np.array([number], dtype=np.uint64))
    document = stored_document(job.documents_url(job.plan.unit(int(unit))), int(position))
    return replace(document, text=document.text[:SAMPLE_CHARS])
