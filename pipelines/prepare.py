"""The stage `prepare`: raw text to a folder of token shards that training reads by index, snapshot after snapshot.

    <output>/tokenizer/          the tokenizer, given or trained on the first snapshot's data
             train/, validation/ the shards of all snapshots            (format: llada/data/tokens/shards.py)
             units/, documents/  reports per work unit, filtered text   (what a rerun skips)
             quarantine/         the records that could not be read, with the reason
             snapshots/0000/     one per run that found new files: its plan, the deduplication's index, report.html,
                                 the lists of shards up to it, unigram counts, manifest.json
             manifest.json       the newest snapshot's, written last

The same command again does what is missing; when the input has grown, it prepares the new files as the next snapshot,
without what an earlier one holds already. Each step below is a barrier; its tasks (see llada.data.work.job)
need no Ray, and the result depends neither on the number of workers, nor on order, nor on interruptions.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from llada.data.dedup.clusters import read_clusters
from llada.data.dedup.decontaminate import build_index
from llada.data.dedup.steps import locate
from llada.data.outcomes import SAMPLE_CHARS, Report, merge
from llada.data.read.listing import list_inputs
from llada.data.report.page import render_report
from llada.data.tokens.shards import write_index
from llada.data.work.group_tasks import group_reports, group_shards, group_unigrams, merge_group
from llada.data.work.job import SPLITS, Job, PrepareConfig, SourceConfig
from llada.data.work.pack_tasks import pack_unit
from llada.data.work.read_tasks import read_text_of, sample_unit
from llada.data.work.units import Plan
from llada.files import (
    absolute,
    file_sizes,
    filesystem,
    join,
    local_path,
    read_bytes,
    sha256,
    write_bytes,
)
from llada.tokenizer import (
    END_OF_TURN,
    ensure_special_tokens,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    vocab_size,
)
from pipelines.corpus.duplicates import clean_up, find_all_duplicates, left_to_clean
from pipelines.corpus.snapshots import (
    open_snapshot,
    publish,
    refresh,
    snapshot_url,
    source_epochs,
    still_unread,
)
from pipelines.runners.tasks import TaskRun
from pipelines.stage.artifact import (
    Output,
    StageError,
    config_hash,
    fetch_folder,
    open_output,
    put_folder,
    storage_errors,
)
from pipelines.stage.cluster import ClusterConfig, connect

_log = logging.getLogger(__name__)
_LAST_TOKENIZER_FILE = "tokenizer_config.json"  # put_folder goes by name, so this one is written last
_MAX_SAMPLED_UNITS = 1000  # of a tokenizer's training text


def prepare(
    config: PrepareConfig,
    *,
    inputs: Sequence[str] = (),
    output: str,
    cluster: ClusterConfig,
    tracker: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Prepare `inputs` (files, folders, globs, "@" lists), or else the sources of `config`, into the folder `output`
    and return the newest snapshot's manifest. `tracker` is a run of pipelines/stage/tracking.py or None.

    Raises StageError when there is nothing to read, too much is unreadable, or no row comes out.
    """
    output = absolute(output)
    sources = _sources(config, inputs)
    given = []
    if config.tokenizer is not None:
        given = [{"url": config.tokenizer, "id": "tokenizer " + _given_tokenizer_hash(config.tokenizer)}]
    folder = open_output(output, stage="prepare", config=config.content(), inputs=given)
    with storage_errors(output):
        try:
            job, earlier = open_snapshot(config, sources, output)
        except (ValueError, FileNotFoundError) as error:
            raise StageError(str(error)) from error
    log_dir = join(output, "logs") if local_path(output) else tempfile.mkdtemp(prefix="llada-prepare-")
    log_dir = local_path(log_dir) or log_dir
    if left := left_to_clean(config, output, earlier):
        with storage_errors(output), connect(cluster, log_dir):
            for finished in left:
                clean_up(TaskRun(finished, cluster, progress))
    if job is None:
        return refresh(folder, sources, earlier)
    if tracker is not None:
        tracker.log_params(asdict(config))
        for url in (url for source in sources for url in source.input):
            tracker.log_input(url, context="raw", manifest={"config_hash": job.plan.id})
    with storage_errors(output), connect(cluster, log_dir):
        run = TaskRun(job, cluster, progress)
        job = run.job = replace(job, resources_hash=_settle_resources(job, sources))
        tokenizer, tokenizer_hash = _settle_tokenizer(run)
        job = run.job = replace(job, tokenizer_hash=tokenizer_hash)
        if config.deduplicates:
            job = run.job = find_all_duplicates(run, earlier)
        run.step("pack", pack_unit, range(job.plan.units))
        run.step("merge", merge_group, range(job.plan.groups))
        manifest = _finish(folder, run, sources, earlier, tokenizer, tracker)
        if tracker is not None:
            counts = manifest["counts"].items()
            tracker.log_metrics({name: n for name, n in counts if isinstance(n, int | float)})
            for name in ("manifest.json", "report.html"):
                tracker.log_artifact(join(job.snapshot, name))
        if config.deduplicates and not config.keep_documents:
            clean_up(run)
    return manifest


# --- Input -------------------------------------------------------------------------------------------------------------


def _sources(config: PrepareConfig, inputs: Sequence[str]) -> list[SourceConfig]:
    """The corpora to read, with absolute inputs."""
    try:
        config.validate()
    except ValueError as error:
        raise StageError(str(error)) from error
    if inputs and config.sources:
        raise StageError("give either --input or --mixture: a mixture names its own inputs")
    sources = list(config.sources) or [SourceConfig("", tuple(inputs), read=config.read)]

    def settled(url: str) -> str:
        return "@" + absolute(url[1:]) if url.startswith("@") else absolute(url)

    sources = [replace(s, input=tuple(settled(url) for url in s.input)) for s in sources]
    try:
        for source in sources:
            next(list_inputs(source.input))  # before anything is written
    except (ValueError, FileNotFoundError) as error:
        raise StageError(str(error)) from error
    return sources


# --- Before the shards ------------------------------------------------------------------------------------------------


def _settle_resources(job: Job, sources: Sequence[SourceConfig]) -> str:
    """Put the index of the evaluation sets, as they are now, into the snapshot; a hash of it and of the other files
    that the filters use, "" without any."""
    urls = [url for source in sources for each in source.read.chain() for url in each.files()]
    try:
        if job.config.decontamination.files:
            urls.append(join(job.snapshot, "decontamination.safetensors"))
            build_index(job.config.decontamination).save(urls[-1])
        return config_hash({"files": [sha256(url) for url in urls]}) if urls else ""
    except (ValueError, FileNotFoundError) as error:
        raise StageError(str(error)) from error


def _given_tokenizer_hash(url: str) -> str:
    try:
        return hashlib.sha256(read_bytes(join(url, "tokenizer.json"))).hexdigest()[:16]
    except FileNotFoundError:
        raise StageError(f"no tokenizer.json in {url}; name a tokenizer's folder, or train one") from None


def _settle_tokenizer(run: TaskRun) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer in output/tokenizer, put there first unless an earlier run did, and a hash of its files."""
    config, url = run.job.config, join(run.job.output, "tokenizer")
    if _LAST_TOKENIZER_FILE not in file_sizes(url):
        if config.tokenizer is not None:
            tokenizer = ensure_special_tokens(load_tokenizer(fetch_folder(config.tokenizer)))
        else:
            tokenizer = train_tokenizer(_sample(run), config.train_tokenizer_vocab or 0)
        with tempfile.TemporaryDirectory() as local:
            save_tokenizer(tokenizer, local)
            put_folder(local, url)
    files = {name: read_bytes(join(url, name)) for name in sorted(file_sizes(url))}
    content = b"".join(name.encode() + b"\0" + data for name, data in files.items())
    return load_tokenizer(fetch_folder(url)), hashlib.sha256(content).hexdigest()[:16]


def _sample(run: TaskRun) -> Iterator[str]:
    """Texts from evenly spread units, in the order of the units."""
    plan = run.job.plan
    step = max(1, plan.units // _MAX_SAMPLED_UNITS)
    numbers = range(0, plan.units, step)
    budget = math.ceil(run.job.config.tokenizer_sample_bytes / len(numbers))
    results = dict(run.map("sample", partial(_sample_task, run.job, budget), numbers))
    texts = [text for number in numbers for text in results[number]["texts"]]
    if not texts:
        lost = sum((Counter(result["lost"]) for result in results.values()), Counter())
        first = next((example for result in results.values() for example in result["examples"]), None)
        raise StageError(
            "nothing to train a tokenizer on: no usable document in the train split (left out: "
            + _reasons(lost)
            + (f"; first: {first['source']} line {first['line']}" if first else "")
            + ")"
        )
    if run.progress:
        print(f"training a tokenizer on {sum(map(len, texts)):,} characters", file=sys.stderr)
    yield from texts


def _sample_task(job: Job, budget: int, number: int) -> dict[str, Any]:
    texts, rejects, refused = sample_unit(job, number, budget)
    return {"texts": texts, "lost": rejects.counts + refused, "examples": rejects.examples[:1]}


# --- Manifest ---------------------------------------------------------------------------------------------------------


def _finish(
    folder: Output,
    run: TaskRun,
    sources: Sequence[SourceConfig],
    earlier: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    tracker: Any,
) -> dict[str, Any]:
    """Add the groups up, check the sums, and write the lists of shards, unigram counts, report and manifest."""
    job, size = run.job, vocab_size(tokenizer)
    before = earlier[-1]["dataset"] if earlier else None
    unigrams = np.zeros(size, dtype=np.int64)
    by_source: dict[str, Report] = {}
    for group in range(job.plan.groups):
        unigrams += group_unigrams(job, group, size)
        for report in group_reports(job, group):
            held = by_source.get(report.source)
            by_source[report.source] = merge([held, report] if held else [report])
    total = merge(by_source.values())
    try:
        _check(job.config, total, job.plan, job.output, is_first=not earlier)
    except StageError:
        # The remedies change the input: list it again next time. What was read is kept for what stays the same.
        fs, path = filesystem(join(job.plan.folder, "plan.json"))
        fs.rm_file(path)
        raise
    unread = still_unread(job.plan, earlier[-1]["counts"]["unreadable_files"]) if earlier else []
    if before:
        unigrams += np.load(
            io.BytesIO(read_bytes(join(snapshot_url(job.output, len(earlier) - 1), "unigram_counts.npy")))
        )
    files = {"unigram_counts.npy": _write_array(join(job.snapshot, "unigram_counts.npy"), unigrams)}
    splits: dict[str, Any] = {}
    for split in SPLITS:
        name = f"{split}.parquet"
        groups = (group_shards(job, group) for group in range(job.plan.groups))
        own_shards = (shard for shards in groups for shard in shards if shard["split"] == split)
        files[name] = write_index(join(job.snapshot, name), own_shards)
        held = before["splits"][split] if before else {}
        own = total.splits[split]
        splits[split] = {what: held.get(what, 0) + own[what] for what in ("documents", "rows", "tokens")}
        splits[split]["indexes"] = [
            *(
                join("..", f"{len(earlier) - 1:04d}", n) if "/" not in n else n
                for n in held.get("indexes", [])
            ),
            name,
        ]
    put_folder(fetch_folder(join(job.output, "tokenizer")), join(job.snapshot, "tokenizer"))
    for name in sorted(file_sizes(join(job.snapshot, "tokenizer"))):
        data = read_bytes(join(job.snapshot, "tokenizer", name))
        files[join("tokenizer", name)] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    trained = {name: report.splits["train"] for name, report in by_source.items()}
    for name, counts in (before or {}).get("sources", {}).items():
        trained[name] = {what: n + trained.get(name, {}).get(what, 0) for what, n in counts.items()}
    shares = unigrams[unigrams > 0] / unigrams.sum()
    clusters = None
    if job.documents_dedup is not None:
        _show_what_stayed(job, by_source)
        clusters = read_clusters(job.dedup_folder("documents"))
        for cluster in clusters.largest:
            cluster["texts"] = [_document(job, number) for number in cluster["ids"]]
    page = render_report(by_source, plan=job.plan, config=job.config, clusters=clusters)
    write_bytes(join(job.snapshot, "report.html"), page.encode())
    manifest = folder.describe(
        {
            "plan_id": job.plan.id,
            "dedup_id": job.dedup_id,
            "resources_hash": job.resources_hash,
            "units": job.plan.units,
            "files": job.plan.files,
            "input_bytes": total.input_bytes,
            "documents_read": total.documents(),
            "documents_kept": total.documents("kept"),
            "records_rejected": sum(total.rejected.values()),
            "rejected": total.rejected,
            "filtered": dict(sorted(total.refused().items())),
            "edits": total.edits,
            "duplicate_clusters": clusters.number if clusters else 0,
            "largest_duplicate_cluster": clusters.largest[0]["size"] if clusters and clusters.largest else 0,
            "damaged_files": total.damaged_files,
            "unreadable_files": [*unread, *total.unreadable_files],
            **{
                f"{split}_{what}": splits[split][what]
                for split in SPLITS
                for what in ("documents", "rows", "tokens")
            },
            "unigram_entropy": float(-(shares * np.log(shares)).sum()),  # nats per token of the train split
        },
        kind="tokens",
        files=files,
        mlflow_run_id=tracker.wait_started() if tracker else None,
        dataset={
            "kind": job.config.kind,
            "row_length": job.config.row_length,
            "packing": job.config.packing,
            "vocab_size": size,
            "mask_token_id": tokenizer.mask_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eot_token_id": tokenizer.get_vocab().get(END_OF_TURN),
            "tokenizer_hash": job.tokenizer_hash,
            "root": "../..",
            "splits": splits,
            "sources": trained,
            "epochs": source_epochs(sources, trained),
        },
    )
    return publish(folder, manifest, len(earlier))


def _show_what_stayed(job: Job, by_source: dict[str, Report]) -> None:
    """Give the report's samples of duplicates the text that stayed for them."""
    for report in by_source.values():
        for sample in report.samples.get("duplicate", []):
            sample["kept_text"] = _document(job, sample["value"])["text"]


def _document(job: Job, number: int) -> dict[str, str]:
    """The beginning of a document that was deduplicated, by its id, with its language and place."""
    (unit,), (position,) = locate(np.array([number], dtype=np.uint64))
    document = read_text_of(job, job.plan.unit(int(unit)), int(position))
    return {
        "text": document.text[:SAMPLE_CHARS],
        "language": document.language,
        "place": document.place,
    }


def _write_array(url: str, array: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_bytes(url, buffer.getvalue())
    return {"bytes": buffer.tell(), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}


def _check(config: PrepareConfig, total: Report, plan: Plan, url: str, *, is_first: bool) -> None:
    """Stop when the result would be no good; warn about what was lost."""
    lost, refused = Counter(total.rejected), total.refused()
    seen = total.documents() + lost.total()
    if lost.total() > config.max_invalid_fraction * seen:
        raise StageError(
            f"{lost.total():,} of {seen:,} records cannot be used ({_reasons(lost + refused)}); see "
            f"{join(url, 'quarantine')}, mend the input, or raise max_invalid_fraction"
        )
    unread = {label.split("#")[0] for label in total.unreadable_files}
    if len(unread) > max(1, config.max_unreadable_fraction * plan.files):  # a single one never stops a run
        raise StageError(
            f"{len(unread):,} of {plan.files:,} files could not be read, {min(unread)} among them; "
            "run again when they can, or raise max_unreadable_fraction"
        )
    if is_first and not total.splits["train"]["rows"]:
        remedy = "check --input and the filters"
        if total.splits["validation"]["rows"]:
            remedy = "all went to validation: set read.section_chars to cut long documents, or lower validation_fraction"
        raise StageError(
            f"no training rows from {seen:,} records (left out: {_reasons(lost + refused)}); {remedy}"
        )
    for name in total.damaged_files:
        _log.warning("damaged, its sound records were used: %s", name)
    for name in total.unreadable_files:
        _log.warning("could not be read and is left out, a later run tries again: %s", name)


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in counts.most_common(4)) or "none"


if __name__ == "__main__":
    from pipelines.cli import main

    main(["prepare", *sys.argv[1:]])
