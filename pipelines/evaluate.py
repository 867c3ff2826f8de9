"""The command `evaluate`: a checkpoint's perplexity bound on held-out shards, samples of its text, and the papers' benchmarks.

    <output>/results.json      the figures, and in "settings" those of each task that they were made with
             samples.jsonl     what it writes                  rows/, requests/  per-block figures (what a rerun skips)
             benchmarks.md, benchmarks.svg    ours beside the published figures
             benchmarks/       each document of a benchmark, with what was asked and answered
             manifest.json     last

`llada evaluate --compare A B` sets two such outputs against each other.

Blocks of rows go through a Ray Data actor pool, each actor with one copy of the model. The noise belongs to the row, so
the number of actors changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, cast

from transformers import PreTrainedTokenizerFast

import llada
from llada.data.tokens.manifest import load_dataset_entry, resolve_snapshot
from llada.errors import UserError
from llada.evals.benchmarks.published import given_settings
from llada.evals.benchmarks.table import notes, table_rows, to_terminal
from llada.evals.compare import CompareConfig, compare, comparison_rows
from llada.evals.evaluation import B, EvaluateConfig, Evaluation, Figures, R, Task
from llada.evals.tasks import TASKS, check_heeded
from llada.files import absolute, file_sizes, join, storage_errors, write_bytes
from llada.model.hf import read_config
from llada.model.transformer import Transformer
from llada.training.parallel import resolve_precision, training_device
from pipelines.runners.actors import map_blocks, require_checkpoint
from pipelines.stage.artifact import (
    Manifest,
    fetch_folder,
    require_same_tokenizer,
)
from pipelines.stage.cluster import ClusterConfig, connect
from pipelines.stage.command import Common, Flat, parse, run_command, run_stage
from pipelines.stage.lifecycle import begin_stage, finish_stage, folder_input, named_input
from pipelines.stage.tracking import Tracker


@dataclass(frozen=True)
class EvaluateArgs:
    """A checkpoint's perplexity bound, samples, and benchmarks. Of two outputs, `llada evaluate --compare A B` tells the differences."""

    model: str
    """Checkpoint folder."""
    common: Annotated[Common, Flat]
    data: str | None = None
    """A prepared folder, for the perplexity bound."""
    config: Annotated[EvaluateConfig, Flat] = EvaluateConfig()


@dataclass(frozen=True)
class CompareArgs:
    """Two outputs against each other, by the benchmarks and items that both have."""

    compare: tuple[str, str]
    """Folders, or their results.json."""
    config: Annotated[CompareConfig, Flat] = CompareConfig()


def main(argv: Sequence[str]) -> None:
    """`llada evaluate …`"""
    if any(word.split("=")[0] == "--compare" for word in argv):
        return _compare(parse(CompareArgs, argv, "evaluate"))
    args = parse_words(argv)
    manifest = run_stage("evaluate", evaluate, args.common, args.config, model=args.model, data=args.data)
    results = manifest["results"]
    others = ("samples", "benchmarks", "settings")
    figures = {name: value for name, value in results.items() if name not in others}
    width = max(map(len, figures), default=0) + 2
    for name, value in figures.items():
        print(f"{name:<{width}}{value:,.4f}" if isinstance(value, float) else f"{name:<{width}}{value:,}")
    if summaries := list(results.get("benchmarks", {}).values()):
        print("", to_terminal(table_rows(summaries)), *notes(summaries), sep="\n")
    for sample in results.get("samples", []):
        print(f"--- {sample['prompt']}\n{sample['text']}")


def _compare(args: CompareArgs) -> None:
    found = compare(*args.compare, args.config)
    print(to_terminal(comparison_rows(found, args.config)), *found.remarks, sep="\n")


def parse_words(argv: Sequence[str]) -> EvaluateArgs:
    """The arguments. Beside published settings it is kept which settings were given: these go before them."""
    args = parse(EvaluateArgs, argv, "evaluate")
    if args.config.benchmarks.settings is None:
        return args
    benchmarks = replace(args.config.benchmarks, given=given_settings(argv))
    return replace(args, config=replace(args.config, benchmarks=benchmarks))


def evaluate(
    config: EvaluateConfig,
    *,
    model: str,
    data: str | None,
    output: str,
    cluster: ClusterConfig,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> Manifest:
    """Evaluate the checkpoint folder `model`, by the prepared folder `data` for perplexity; the manifest.

    Raises UserError: no checkpoint; perplexity without data, or with data of another vocabulary; a setting of a task that is not run.
    """
    tasks = [TASKS.find(name) for name in config.tasks]
    needing = [name for name, task in zip(config.tasks, tasks, strict=True) if task.needs_data]
    if needing and data is None:
        raise UserError(f"the task {needing[0]} needs --data, a prepared folder")
    check_heeded(config)
    for task in tasks:
        task.needs(config)
    model, output, data = absolute(model), absolute(output), data and resolve_snapshot(absolute(data))
    require_checkpoint(model)
    if data and needing:
        _check_fit(model, data)
    folder = begin_stage(
        "evaluate",
        output,
        config=asdict(config),
        inputs=[
            folder_input("model", model),
            *([folder_input("data", data)] if data else []),
            *(
                named_input(name, absolute(url))
                for name, task in zip(config.tasks, tasks, strict=True)
                for url in task.reads(config)
                if url
            ),
        ],
        tracker=tracker,
        in_force=settings_in_force(config, tasks),
    )
    if folder.manifest is not None:
        return folder.manifest

    def on_ray(build: Callable[[], Callable[[B], R]], blocks: Sequence[B], *, folder: str) -> Iterator[R]:
        has_requests = any("num_requests" in block for block in blocks)
        return map_blocks(
            build,
            blocks,
            output=join(output, folder),
            cluster=cluster,
            label=folder if has_requests else "evaluate",
            progress=progress,
            size=lambda block: int(cast(Any, block).get("num_requests", 1)),
            unit="request" if has_requests else "block",
        )

    evaluation = Evaluation(
        config,
        model,
        partial(_open_model, model),
        data,
        output,
        on_ray,
        partial(fetch_folder, model),
        fetch_folder,
    )
    results: Figures = {}
    with storage_errors(output), connect(cluster, join(output, "logs")):
        for task in tasks:
            results |= task.measure(evaluation)
        results["settings"] = settings_by_task(config)
        write_bytes(join(output, "results.json"), (json.dumps(results, indent=2) + "\n").encode())
    counts = {name: value for name, value in results.items() if isinstance(value, int | float)}
    reports = [name for task in tasks for report in task.reports for name in _files_of(output, report)]
    return finish_stage(
        folder, tracker, counts, kind="evaluation", artifacts=("results.json", *reports), results=results
    )


def _files_of(output: str, report: str) -> list[str]:
    """The names below the output of a task's report, a file or all of a folder."""
    if not report.endswith("/"):
        return [report]
    return [f"{report}{name}" for name in file_sizes(join(output, report))]


def settings_in_force(config: EvaluateConfig, tasks: Sequence[Task]) -> dict[str, Any]:
    """The settings that these tasks make use of."""
    settings = {**asdict(config), "sampling": config.sampling.in_force()}
    heeded = {"tasks"}.union(*(settings if task.heeds is None else task.heeds for task in tasks))
    return {name: value for name, value in settings.items() if name in heeded}


def settings_by_task(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """{task: the settings that it makes use of}, as JSON gives them back. A benchmark's own stand beside its figure."""
    found = {name: settings_in_force(config, [TASKS.find(name)]) for name in config.tasks}
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(found))
    return {
        task: {name: values[name] for name in values if name != "tasks"} for task, values in plain.items()
    }


def _check_fit(model: str, data: str) -> None:
    """Refuse data that this network cannot score, before any actor is started."""
    network, _ = read_config(fetch_folder(model))
    if network.causal:
        raise UserError(
            f"{model} is autoregressive: its held-out loss is exact and stands in its metrics.jsonl"
        )
    dataset = load_dataset_entry(data)
    if dataset.vocab_size > network.vocab_size or dataset.mask_token_id != network.mask_token_id:
        raise UserError(
            f"{data} ({dataset.vocab_size} ids, mask {dataset.mask_token_id}) does not fit {model} "
            f"({network.vocab_size} ids, mask {network.mask_token_id}): prepare it with the model's tokenizer"
        )
    if dataset.row_length > network.max_length:
        raise UserError(
            f"{data} has rows of {dataset.row_length} tokens, {model} takes {network.max_length}: prepare shorter rows"
        )
    require_same_tokenizer(model, data)


def _open_model(url: str, *, fast: bool) -> tuple[Transformer, PreTrainedTokenizerFast | None]:
    """The checkpoint on this process' device (see llada.evals.evaluation.OpenModel)."""
    device = training_device()
    return llada.load(
        fetch_folder(url), device=device, dtype=resolve_precision("auto", device) if fast else None
    )


if __name__ == "__main__":
    run_command("evaluate")
