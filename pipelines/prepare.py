"""The stage `prepare`: raw text to a folder of token shards that training reads by index, snapshot after snapshot.

    <output>/tokenizer/          the tokenizer, given or trained on the first snapshot's data
             train/, validation/ the shards of all snapshots            (format: llada/data/tokens/shards.py)
             units/, documents/  reports per work unit, filtered text   (what a rerun skips)
             quarantine/         the records that could not be read, with the reason
             snapshots/0000/     one per run that found new files: its plan, the deduplication's index, report.html,
                                 the lists of shards up to it, unigram counts, manifest.json
             manifest.json       the newest snapshot's, written last

The same command again does what is missing; when the input has grown, it prepares the new files as the next snapshot,
without what an earlier one holds already. Each step below is a barrier; its tasks (llada/data/work/tasks.py, what
happens in them to a document: llada/data/prepare.py) need no Ray, and the result depends neither on the number of
workers, nor on order, nor on interruptions.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from llada.data.prepare import filter_unit, pack_unit
from llada.data.work.config import PrepareConfig
from llada.data.work.job import Job, Removals, Snapshot
from llada.data.work.tasks import merge_group
from llada.files import absolute, join, local_path
from pipelines.corpus.duplicates import clean_up, count_rows, find_removals, left_to_clean
from pipelines.corpus.finish import finish_snapshot
from pipelines.corpus.inputs import settle_resources, settle_sources
from pipelines.corpus.snapshots import finished_snapshots, open_plan, refresh
from pipelines.corpus.tokenizer import given_tokenizer, settle_tokenizer
from pipelines.runners.tasks import TaskRun
from pipelines.stage.artifact import open_output, storage_errors
from pipelines.stage.cluster import ClusterConfig, connect


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

    Raises UserError when there is nothing to read, too much is unreadable, or no row comes out.
    """
    output, run = absolute(output), TaskRun(cluster, progress)
    sources = settle_sources(config, inputs)
    folder = open_output(output, stage="prepare", config=config.content(), inputs=given_tokenizer(config))
    with storage_errors(output):
        earlier = finished_snapshots(output)
        snapshot = Snapshot(output, len(earlier))
        plan = open_plan(config, sources, snapshot, earlier)
    log_dir = join(output, "logs") if local_path(output) else tempfile.mkdtemp(prefix="llada-prepare-")
    log_dir = local_path(log_dir) or log_dir
    if unclean := left_to_clean(config, earlier):
        with storage_errors(output), connect(cluster, log_dir):
            for finished in unclean:
                clean_up(run, finished)
    if plan is None:
        return refresh(folder, sources, earlier)
    if tracker is not None:
        tracker.log_params(asdict(config))
        for url in (url for source in sources for url in source.input):
            tracker.log_input(url, context="raw", manifest={"config_hash": plan.id})
    with storage_errors(output), connect(cluster, log_dir):
        job = Job(config, snapshot, plan, settle_resources(config, snapshot, sources))
        tokenizer, tokenizer_hash = settle_tokenizer(run, job)
        removals = Removals()
        if config.deduplicates:
            filtered = count_rows(run, "read", partial(filter_unit, job), plan.units)
            removals = find_removals(run, job, tokenizer_hash, filtered, earlier)
        packing = job.packing(tokenizer_hash, removals)
        run.step("pack", partial(pack_unit, packing), range(plan.units))
        run.step("merge", partial(merge_group, packing), range(plan.groups))
        manifest = finish_snapshot(folder, packing, sources, earlier, tokenizer, tracker)
        if tracker is not None:
            counts = manifest["counts"].items()
            tracker.log_metrics({name: n for name, n in counts if isinstance(n, int | float)})
            for url in (snapshot.manifest_url, snapshot.report_url):
                tracker.log_artifact(url)
        if config.deduplicates and not config.keep_documents:
            clean_up(run, packing)
    return manifest


if __name__ == "__main__":
    from pipelines.cli import main

    main(["prepare", *sys.argv[1:]])
