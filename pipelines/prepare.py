"""The command `prepare`: raw text to a folder of token shards that training reads by index, snapshot after snapshot.

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

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

from llada.data.prepare import filter_unit, pack_unit
from llada.data.tokens.packing import Kind
from llada.data.work.config import PrepareConfig, SourceConfig
from llada.data.work.job import Job, Removals, Snapshot
from llada.data.work.read_config import ReadConfig
from llada.data.work.tasks import merge_group
from llada.errors import UserError
from llada.files import absolute, join, local_path, storage_errors
from llada.settings import from_dict, load_yaml, merge_settings, require
from pipelines.corpus.duplicates import clean_up, count_rows, find_removals, left_to_clean
from pipelines.corpus.finish import describe_left_out, finish_snapshot
from pipelines.corpus.inputs import settle_resources, settle_sources
from pipelines.corpus.snapshots import finished_snapshots, open_plan, refresh
from pipelines.corpus.tokenizer import given_tokenizer, settle_tokenizer
from pipelines.runners.tasks import TaskRun
from pipelines.stage.artifact import Manifest, open_output
from pipelines.stage.cluster import ClusterConfig, connect
from pipelines.stage.command import Common, Flat, parse, parse_known, run_command, run_stage, take_recipe
from pipelines.stage.delivery import tracking_places
from pipelines.stage.tracking import Tracker, default_tracking_uri

# --- Command line -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareArgs:
    """Raw text to token shards."""

    common: Annotated[Common, Flat]
    config: Annotated[PrepareConfig, Flat]
    input: tuple[str, ...] = ()
    """Files, folders, globs, or @ and a list of files, such as .jsonl.gz and .parquet; an error names them all."""
    mixture: str | None = None
    """YAML file of several weighted sources instead: {name: {input: [...], weight: 0.7, read: {filters: [web]}}}."""


@dataclass(frozen=True)
class _Kind:
    """The option that decides which of a preset's two preparations gives the other options' defaults."""

    kind: Kind = "pretrain"


def main(argv: Sequence[str]) -> None:
    """`llada prepare <preset> …`"""
    args, config = parse_words(argv)
    manifest = run_stage("prepare", prepare, args.common, config, inputs=args.input, preset=argv[0])
    counts = manifest["counts"]
    print(
        f"{args.common.output}: {counts['train_tokens']:,} training tokens in {counts['train_rows']:,} rows, "
        f"{counts['validation_rows']:,} validation rows"
    )
    for source, found in counts.get("tokenizer_check", {}).items():
        print(describe_check(source, found))
    print(f"left out: {describe_left_out(counts)}")


def describe_check(source: str, found: Mapping[str, int]) -> str:
    """What the tokenizer check found of a source (llada/data/tokens/fidelity.py), in a line."""
    sampled = Counter(found)
    return (
        f"tokenizer check{f' of {source}' if source else ''}: {sampled['documents']:,} documents, "
        f"{_share(sampled['lost_characters'], sampled['characters'])} of their characters lost, "
        f"{_share(sampled['unknown_tokens'], sampled['tokens'])} of the tokens unknown, "
        f"{sampled['empty_documents']:,} empty, {sampled['lossy_documents']:,} do not read back as they were"
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "none"


def parse_words(argv: Sequence[str]) -> tuple[PrepareArgs, PrepareConfig]:
    """(the arguments, the configuration that they and the preset make together)."""
    recipe, words = take_recipe(argv, "prepare")
    kind = parse_known(_Kind, words, "prepare <preset>").kind
    preset = recipe.prepare if kind == "pretrain" else recipe.sft_prepare
    args = parse(PrepareArgs, words, "prepare <preset>", config=preset)
    config = settle_vocabulary(args.config, preset)
    if args.mixture:
        config = replace(config, sources=load_mixture(args.mixture, config.read))
    return args, config


def settle_vocabulary(config: PrepareConfig, preset: PrepareConfig) -> PrepareConfig:
    """`config` where a tokenizer that was asked for takes the place of the preset's training of one, and the other way
    round. Raises UserError when both were asked for."""
    new_tokenizer = config.tokenizer if config.tokenizer != preset.tokenizer else None
    new_vocabulary = config.train_tokenizer_vocab
    if new_vocabulary == preset.train_tokenizer_vocab:
        new_vocabulary = None
    require(not (new_tokenizer and new_vocabulary), "give either --tokenizer or --train-tokenizer-vocab")
    if new_tokenizer:
        return replace(config, train_tokenizer_vocab=None)
    if new_vocabulary:
        return replace(config, tokenizer=None)
    return config


def load_mixture(path: str, read: ReadConfig) -> tuple[SourceConfig, ...]:
    """The sources of a mixture file; what they do not say of reading is as in `read`. Raises UserError."""
    loaded = load_yaml(path, "mixture")
    if not all(isinstance(source, dict) for source in loaded.values()):
        raise UserError(f"{path} must hold 'name:' and below it the source's settings")
    return tuple(
        from_dict(
            SourceConfig,
            merge_settings({"read": asdict(read)}, {"name": str(name), **source}),
            f"{path}: {name}.",
        )
        for name, source in loaded.items()
    )


# --- The stage --------------------------------------------------------------------------------------------------------


def prepare(
    config: PrepareConfig,
    *,
    inputs: Sequence[str] = (),
    written: Sequence[str] = (),
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None = None,
    progress: bool = True,
    preset: str | None = None,
) -> Manifest:
    """Prepare `inputs` (files, folders, globs, "@" lists), or else the sources of `config`, into the folder `output`
    and return the newest snapshot's manifest. What lies in the output, or in `written`, is no input. `tracker` is a run
    of pipelines/stage/tracking.py or None; `preset` is what the report calls the configuration.

    Raises UserError when there is nothing to read, too much is unreadable, or no row comes out.
    """
    begun = time.monotonic()
    output, run = absolute(output), TaskRun(cluster, progress)
    written = [output, *written, *tracking_places(tracker.uri if tracker else default_tracking_uri(output))]
    sources = settle_sources(config, inputs, written)
    folder = open_output(output, stage="prepare", config=config.content(), inputs=given_tokenizer(config))
    with storage_errors(output):
        earlier = finished_snapshots(output)
        snapshot = Snapshot(output, len(earlier))
        plan = open_plan(config, sources, snapshot, earlier, written)
    log_dir = join(output, "logs") if local_path(output) else tempfile.mkdtemp(prefix="llada-prepare-")
    log_dir = local_path(log_dir) or log_dir
    if unclean := left_to_clean(config, earlier):
        with storage_errors(output), connect(cluster, log_dir):
            for finished in unclean:
                clean_up(run, finished)
    if plan is None:
        return refresh(folder, sources, earlier)
    if tracker is not None:
        tracker.log_params(config.in_force())
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
        manifest = finish_snapshot(
            folder, packing, sources, earlier, tokenizer, tracker, preset=preset, begun=begun
        )
        if tracker is not None:
            counts = manifest["counts"].items()
            tracker.log_metrics({name: n for name, n in counts if isinstance(n, int | float)})
            for url in (snapshot.manifest_url, snapshot.report_url):
                tracker.log_artifact(url)
        if config.deduplicates and not config.keep_documents:
            clean_up(run, packing)
    return manifest


if __name__ == "__main__":
    run_command("prepare")
