"""The stage `prepare`: raw text to a folder of token shards that training reads by index.

    <output>/tokenizer/          the tokenizer, given or trained on this data (a barrier: all units wait for it)
             train/, validation/ the shards                         (format: llada/data/shards.py)
             units/              one report per work unit            (what a rerun skips)
             quarantine/         the records that could not be read, with the reason
             unigram_counts.npy  how often each token is trained on  (for the unigram baseline of later stages)
             manifest.json       last

Ray Data spreads the units over the cluster; each is llada.data.prepare.process_unit, which needs no Ray. The shards do
not depend on the number of workers, on the order in which units finish, or on interruptions.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import logging
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from llada.data.documents import Rejects, expand_inputs
from llada.data.files import absolute, file_sizes, join, local_path, read_bytes, write_bytes
from llada.data.prepare import (
    SPLITS,
    PrepareConfig,
    UnitReport,
    finished_report,
    load_unit_counts,
    process_unit,
    sample_unit,
)
from llada.data.units import Unit, plan_units
from llada.tokenizer import (
    END_OF_TURN,
    ensure_special_tokens,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    vocab_size,
)
from pipelines.artifact import (
    Output,
    StageError,
    config_hash,
    fetch_folder,
    open_output,
    put_folder,
    storage_errors,
)
from pipelines.cluster import ClusterConfig, connect

_log = logging.getLogger(__name__)
_LAST_TOKENIZER_FILE = "tokenizer_config.json"  # put_folder goes by name, so this one is written last


def prepare(
    config: PrepareConfig,
    *,
    inputs: Sequence[str],
    output: str,
    cluster: ClusterConfig,
    tracker: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Prepare `inputs` (files, folders, globs) into the folder `output` and return its manifest.

    A finished folder is returned as it is; an unfinished one is completed. `tracker` is a run of pipelines/tracking.py
    or None. Raises StageError when there is nothing to read, too much is unreadable, or no row comes out.
    """
    output = absolute(output)
    try:
        config.validate()
        files = expand_inputs([absolute(url) for url in inputs])
        if not files:
            raise ValueError("no --input given")
        units = plan_units(files, config.unit_bytes)
    except (ValueError, FileNotFoundError) as error:
        raise StageError(str(error)) from error
    sources = [{"url": file.url, "id": file.identity} for file in files]
    if config.tokenizer is not None:
        sources.append(
            {"url": config.tokenizer, "id": "tokenizer " + _given_tokenizer_hash(config.tokenizer)}
        )
    folder = open_output(output, stage="prepare", config=config.content(), inputs=sources)
    if folder.manifest is not None:
        return folder.manifest
    if tracker is not None:
        tracker.log_params(asdict(config))
        for url in inputs:
            tracker.log_input(url, context="raw", manifest={"config_hash": config_hash({"inputs": sources})})
    log_dir = join(output, "logs") if local_path(output) else tempfile.mkdtemp(prefix="llada-prepare-")
    with storage_errors(output), connect(cluster, local_path(log_dir) or log_dir):
        tokenizer, tokenizer_hash = _settle_tokenizer(config, units, output, cluster, progress)
        reports = _process_units(config, units, tokenizer_hash, output, cluster, progress)
    manifest = _finish(folder, config, reports, tokenizer, tokenizer_hash, tracker)
    if tracker is not None:
        tracker.log_metrics(
            {name: value for name, value in manifest["counts"].items() if isinstance(value, int | float)}
        )
        tracker.log_artifact(join(output, "manifest.json"))
    return manifest


# --- Tokenizer --------------------------------------------------------------------------------------------------------


def _given_tokenizer_hash(url: str) -> str:
    try:
        return hashlib.sha256(read_bytes(join(url, "tokenizer.json"))).hexdigest()[:16]
    except FileNotFoundError:
        raise StageError(f"no tokenizer.json in {url}; name a tokenizer's folder, or train one") from None


def _settle_tokenizer(
    config: PrepareConfig, units: Sequence[Unit], output: str, cluster: ClusterConfig, progress: bool
) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer in output/tokenizer, put there first unless an earlier run did, and a hash of its files."""
    url = join(output, "tokenizer")
    if _LAST_TOKENIZER_FILE not in file_sizes(url):
        if config.tokenizer is not None:
            tokenizer = ensure_special_tokens(load_tokenizer(fetch_folder(config.tokenizer)))
        else:
            tokenizer = train_tokenizer(
                _sample(config, units, cluster, progress), config.train_tokenizer_vocab or 0
            )
        with tempfile.TemporaryDirectory() as local:
            save_tokenizer(tokenizer, local)
            put_folder(local, url)
    files = {name: read_bytes(join(url, name)) for name in sorted(file_sizes(url))}
    digest = hashlib.sha256(
        b"".join(name.encode() + b"\0" + data for name, data in files.items())
    ).hexdigest()[:16]
    return load_tokenizer(fetch_folder(url)), digest


def _sample(
    config: PrepareConfig, units: Sequence[Unit], cluster: ClusterConfig, progress: bool
) -> Iterator[str]:
    """Texts of every unit, in proportion to its size, in the order of the units."""
    total = sum(unit.size for unit in units) or 1
    budgets = [math.ceil(config.tokenizer_sample_bytes * unit.size / total) for unit in units]
    results: dict[int, dict[str, Any]] = {}
    for index, result in _map_units(
        _sample_task, len(units), cluster, units=units, config=config, budgets=budgets
    ):
        results[index] = json.loads(result)
    texts = [text for index in range(len(units)) for text in results[index]["texts"]]
    if not texts:
        lost = sum((Counter(result["lost"]) for result in results.values()), Counter())
        first = next((example for result in results.values() for example in result["examples"]), None)
        raise StageError(
            "nothing to train a tokenizer on: no usable document in the train split (left out: "
            + (", ".join(f"{reason} {count:,}" for reason, count in lost.most_common(4)) or "none")
            + (f"; first: {first['source']} line {first['line']}" if first else "")
            + ")"
        )
    if progress:
        print(f"training a tokenizer on {sum(map(len, texts)):,} characters", file=sys.stderr)
    yield from texts


def _sample_task(index: int, units: Sequence[Unit], config: PrepareConfig, budgets: Sequence[int]) -> str:
    rejects, filtered = Rejects(), Counter[str]()
    texts = sample_unit(units[index], config, budgets[index], rejects, filtered)
    lost = rejects.counts + filtered
    return json.dumps({"texts": texts, "lost": lost, "examples": rejects.examples[:1]})


# --- Units ------------------------------------------------------------------------------------------------------------


def _process_units(
    config: PrepareConfig,
    units: Sequence[Unit],
    tokenizer_hash: str,
    output: str,
    cluster: ClusterConfig,
    progress: bool,
) -> list[UnitReport]:
    """Do what is not done yet; the reports of all units in their order."""
    sizes = file_sizes(output)
    found = (finished_report(unit, config, tokenizer_hash, output, sizes) for unit in units)
    reports = {index: report for index, report in enumerate(found) if report}
    pending = [index for index in range(len(units)) if index not in reports]
    total, done = sum(unit.size for unit in units), sum(units[index].size for index in reports)
    bar = tqdm(
        total=total,
        initial=done,
        desc="prepare",
        unit="B",
        unit_scale=True,
        disable=not progress,
        leave=False,
    )
    todo = [units[index] for index in pending]
    task = {"units": todo, "config": config, "tokenizer_hash": tokenizer_hash, "output": output}
    with bar:
        for position, result in _map_units(_process_task, len(todo), cluster, **task):
            reports[pending[position]] = UnitReport(**json.loads(result))
            bar.update(todo[position].size)
    return [reports[index] for index in range(len(units))]


def _process_task(
    index: int, units: Sequence[Unit], config: PrepareConfig, tokenizer_hash: str, output: str
) -> str:
    tokenizer = _load_once(join(output, "tokenizer"), tokenizer_hash)
    return json.dumps(asdict(process_unit(units[index], config, tokenizer, tokenizer_hash, output)))


@functools.lru_cache(maxsize=1)
def _load_once(url: str, tokenizer_hash: str) -> PreTrainedTokenizerFast:
    """The tokenizer, loaded once per worker process; the hash tells a later tokenizer at the same place apart."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a unit has one CPU; Ray brings the parallelism
    return load_tokenizer(fetch_folder(url))


def _map_units(
    function: Callable[..., str], count: int, cluster: ClusterConfig, **shared: Any
) -> Iterator[tuple[int, str]]:
    """(index, function(index, **shared)) for 0..count-1, each in a Ray Data task, as they finish."""
    if not count:
        return
    import ray.data

    limits: dict[str, Any] = {"num_cpus": cluster.cpus_per_data_worker}
    if cluster.memory_bytes_per_data_worker:
        limits["memory"] = cluster.memory_bytes_per_data_worker

    def run(batch: dict[str, Any]) -> dict[str, Any]:
        (index,) = batch["index"]
        try:
            return {"index": [index], "result": [function(int(index), **shared)], "errno": [0]}
        except (OSError, ImportError, StageError) as error:
            # As values: through Ray Data an error keeps its text and loses its number.
            return {"index": [index], "result": [str(error)], "errno": [getattr(error, "errno", None) or -1]}

    items = ray.data.from_items([{"index": index} for index in range(count)], override_num_blocks=count)
    pool = ray.data.TaskPoolStrategy(size=cluster.data_workers)
    for row in items.map_batches(run, batch_size=1, compute=pool, **limits).iter_rows():
        if row["errno"] in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(row["errno"], row["result"])
        if row["errno"]:
            raise StageError(
                f"a work unit failed: {row['result']}; what is finished is kept, run the command again"
            )
        yield int(row["index"]), row["result"]


# --- Manifest ---------------------------------------------------------------------------------------------------------


def _finish(
    folder: Output,
    config: PrepareConfig,
    reports: Sequence[UnitReport],
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_hash: str,
    tracker: Any,
) -> dict[str, Any]:
    """Add the reports up, check them, and write the unigram counts and the manifest."""
    rejected, filtered, documents = (_total(reports, name) for name in ("rejected", "filtered", "documents"))
    damaged = [name for report in reports for name in report.damaged_files]
    splits = {split: _split_entry(reports, split) for split in SPLITS}
    _check(config, documents, rejected, filtered, splits, damaged, reports, folder.url)

    size = vocab_size(tokenizer)
    unigrams = np.zeros(size, dtype=np.int64)
    for report in reports:
        unigrams += load_unit_counts(folder.url, report.name, size)
    buffer = io.BytesIO()
    np.save(buffer, unigrams)
    with storage_errors(folder.url):
        write_bytes(join(folder.url, "unigram_counts.npy"), buffer.getvalue())
    shares = unigrams[unigrams > 0] / unigrams.sum()

    shards = [shard for split in SPLITS for shard in splits[split]["shards"]]
    files: dict[str, dict[str, Any]] = {
        s["name"]: {"bytes": s["bytes"], "sha256": s["sha256"]} for s in shards
    }
    for name in [
        "unigram_counts.npy",
        *(join("tokenizer", n) for n in sorted(file_sizes(join(folder.url, "tokenizer")))),
    ]:
        data = read_bytes(join(folder.url, name))
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return folder.finish(
        {
            "units": len(reports),
            "input_bytes": sum(report.input_bytes for report in reports),
            "documents_read": documents["read"],
            "documents_kept": documents["kept"],
            "records_rejected": rejected.total(),
            "rejected": dict(sorted(rejected.items())),
            "filtered": dict(sorted(filtered.items())),
            "damaged_files": damaged,
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
            "kind": config.kind,
            "row_length": config.row_length,
            "vocab_size": size,
            "mask_token_id": tokenizer.mask_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eot_token_id": tokenizer.get_vocab().get(END_OF_TURN),
            "tokenizer_hash": tokenizer_hash,
            "splits": splits,
        },
    )


def _total(reports: Sequence[UnitReport], name: str) -> Counter[str]:
    return sum((Counter(getattr(report, name)) for report in reports), Counter())


def _split_entry(reports: Sequence[UnitReport], split: str) -> dict[str, Any]:
    shards = [
        {k: v for k, v in s.items() if k != "split"} for r in reports for s in r.shards if s["split"] == split
    ]
    return {
        "documents": sum(report.documents.get(split, 0) for report in reports),
        "rows": sum(shard["rows"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "shards": shards,
    }


def _check(
    config: PrepareConfig,
    documents: Counter[str],
    rejected: Counter[str],
    filtered: Counter[str],
    splits: dict[str, dict[str, Any]],
    damaged: Sequence[str],
    reports: Sequence[UnitReport],
    url: str,
) -> None:
    """Stop when the result would be no good; warn about what was lost."""
    lost = rejected.total()
    reasons = (
        ", ".join(f"{reason} {count:,}" for reason, count in (rejected + filtered).most_common(4)) or "none"
    )
    seen = documents["read"] + lost
    if lost > config.max_invalid_fraction * seen:
        first = next(r for r in reports if r.rejected)
        raise StageError(
            f"{lost:,} of {seen:,} records cannot be used ({reasons}); see {join(url, 'quarantine', first.name)}.jsonl, "
            "mend the input, or raise max_invalid_fraction"
        )
    if not splits["train"]["rows"]:
        remedy = "check --input and the filters"
        if splits["validation"]["rows"]:
            remedy = "all went to validation: set section_chars to cut long documents, or lower validation_fraction"
        raise StageError(f"no training rows from {seen:,} records (left out: {reasons}); {remedy}")
    for name in damaged:
        _log.warning("damaged, read as far as possible: %s", name)
    if lost:
        _log.warning(
            "%d of %d records left out as unreadable (%s); see %s",
            lost,
            seen,
            reasons,
            join(url, "quarantine"),
        )
    if config.validation_fraction and not splits["validation"]["rows"]:
        _log.warning("the validation split is empty: too few documents (section_chars cuts long ones)")


if __name__ == "__main__":
    from pipelines.cli import main

    main(["prepare", *sys.argv[1:]])
