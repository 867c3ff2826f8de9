"""Benchmarks as one evaluation task: lm_eval asks and judges, our network answers through `harness`, in our pool of workers.

Each benchmark has settings of its own (published.py). All that can be wrong before the first forward is looked at for all of them
first. What a worker has answered is not asked again by a rerun. The output has

    benchmarks.md, benchmarks.svg    ours beside what is published
    benchmarks/TASK.jsonl            each document with what was asked ("arguments"), answered ("resps", "filtered_resps"), how it was
                                     judged, and of each request its forwards, seconds and the order in which its tokens came
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from llada.errors import UserError
from llada.evals.benchmarks.build import build_tasks, check_programs, data_files
from llada.evals.benchmarks.catalogue import BENCHMARKS
from llada.evals.benchmarks.config import BenchmarkConfig
from llada.evals.benchmarks.documents import (
    check_documents,
    check_examples,
    or_no_document,
    seed_examples,
    settle_documents,
)
from llada.evals.benchmarks.hub import data_errors
from llada.evals.benchmarks.published import (
    Protocol,
    check_given,
    find_settings,
    protocol,
    published,
)
from llada.evals.benchmarks.summaries import Plan, settings_of, summarize
from llada.evals.benchmarks.table import Summary, draw, to_markdown
from llada.evals.evaluation import EvaluateConfig, Evaluation, Figures
from llada.evals.requests.worker import Setup
from llada.files import file_sizes, join, write_bytes
from llada.sampling.config import SamplingConfig
from llada.settings import hint, require

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# What a folder of tasks says of them in.
_TASK_FILES = (".yaml", ".yml", ".py")


def run_benchmarks(evaluation: Evaluation) -> Figures:
    """{"BENCHMARK/METRIC": the figure of a row of the table}, with its standard error as "…_stderr", "TASK/METRIC/FILTER": lm_eval's
    own of each task ("BENCHMARK/TASK/…" where two benchmarks ask the same one), "requests_cut", how many did not fit the context, and
    "benchmarks": {name: Summary}, of a tag, or a group without a figure of its own, {"NAME/TASK": Summary}.

    Raises UserError: no benchmark or an unknown one, data that cannot be had, programs that may not be run, a checkpoint without
    the tokenizer, chat template or context that is needed.
    """
    config = needed_benchmarks(evaluation.config)
    figures: Figures = {}
    summaries: dict[str, Summary] = {}
    with _quiet_libraries():
        plans = _plan_all(evaluation)
        askers = Counter(task for plan in plans for task in plan.loaded["tasks"])
        for plan in plans:
            found = _ask(plan, config.limit)
            # Benchmarks may ask the same tasks in two ways: then each has a place of its own.
            is_alone = all(askers[task] == 1 for task in plan.loaded["tasks"])
            place = "" if is_alone else f"{plan.protocol.name}/"
            figures |= _own_figures(found, place)
            _write_records(evaluation.output, plan, found, place)
            summaries |= summarize(plan, found, place, config.limit)
    settings = find_settings(config.settings) if config.settings else None
    heading = (
        evaluation.model if settings is None else f"{evaluation.model} by the settings of {settings.title}"
    )
    rows = list(summaries.values())
    write_bytes(
        join(evaluation.output, "benchmarks.md"),
        to_markdown(rows, published().sources, heading, settings).encode(),
    )
    write_bytes(join(evaluation.output, "benchmarks.svg"), draw(rows))
    for name, summary in summaries.items():
        figures[f"{name}/{summary['metric']}"] = summary["value"]
        if summary["stderr"] is not None:
            figures[f"{name}/{summary['metric']}_stderr"] = summary["stderr"]
    figures["requests_cut"] = sum(summary["requests_cut"] for summary in rows)
    # As results.json gives it back.
    return dict(json.loads(json.dumps({**figures, "benchmarks": summaries})))


def needed_benchmarks(config: EvaluateConfig) -> BenchmarkConfig:
    """Raises UserError: no benchmark, no folder of tasks, a name that is no setting, published settings or a benchmark that there are
    not, programs that may not be run, the length of another task."""
    benchmarks, length = config.benchmarks, config.sampling.gen_length
    if not benchmarks.names:
        raise UserError("the task benchmarks needs --benchmarks.names, such as hellaswag or gsm8k")
    check_given(benchmarks.given)
    folder = benchmarks.task_folder
    require(folder is None or os.path.isdir(folder), f"benchmarks.task_folder: there is no folder {folder}")
    for name in benchmarks.names:
        how = protocol(name, benchmarks, config.sampling)
        if how.run_as in BENCHMARKS and folder is None:
            check_programs(how.run_as, allow_code_execution=benchmarks.allow_code_execution)
        elif how.run_as not in BENCHMARKS:
            with _quiet_libraries():
                _find_task(how.run_as, folder)
    require(
        length == SamplingConfig().gen_length or "samples" in config.tasks,
        f"benchmarks: sampling.gen_length={length} is the length of the task samples; that of a benchmark is "
        "benchmarks.gen_length",
    )
    return benchmarks


def benchmark_files(config: EvaluateConfig) -> list[str]:
    """The files of documents and examples that are read from the settings' folder of data, and those of a folder of tasks that say
    what a task is."""
    asked = config.benchmarks
    found: list[str] = []
    if asked.task_folder is not None:
        names = file_sizes(str(asked.task_folder))
        found += [join(str(asked.task_folder), name) for name in sorted(names) if name.endswith(_TASK_FILES)]
    for name in asked.names if asked.data is not None else ():
        run_as = protocol(name, asked, config.sampling).run_as
        found += data_files(run_as, str(asked.data)) if run_as in BENCHMARKS else []
    return list(dict.fromkeys(found))


# --- What will be asked -----------------------------------------------------------------------------------------------


def _plan_all(evaluation: Evaluation) -> list[Plan]:
    # Here: it needs an extra, and takes seconds.
    from llada.evals.harness import HarnessModel

    config, folder = evaluation.config.benchmarks, str(evaluation.fetch_model())
    names = list(dict.fromkeys(config.names))
    protocols = [protocol(name, config, evaluation.config.sampling) for name in names]
    own_tasks = _tasks_of_folder(config.task_folder)
    plans = []
    for how in protocols:
        benchmark = None if how.run_as in own_tasks else BENCHMARKS.get(how.run_as)
        if benchmark is None:
            loaded = or_no_document(how.name, partial(_lm_eval_tasks, how, config.task_folder))
        else:
            with data_errors(how.name, takes_folder=True):
                tasks = build_tasks(
                    how.run_as,
                    data=config.data,
                    num_fewshot=how.num_fewshot,
                    allow_code_execution=config.allow_code_execution,
                )
            loaded = {"tasks": {task.task_name: task for task in tasks}}
        model = HarnessModel(
            folder,
            Setup(evaluation.open_model, how.score.max_tokens),
            score=how.score,
            sampling=how.sampling,
            gen_length=how.gen_length,
            map_blocks=evaluation.map_blocks,
            name=how.name,
        )
        if how.chat and not model.tokenizer.chat_template:
            raise UserError(
                f"{how.name} is asked as a chat, and {evaluation.model} has no chat template: leave out --benchmarks.chat, or "
                "give settings of a base model"
            )
        for name, task in loaded["tasks"].items():
            if how.num_fewshot is not None or task.config.num_fewshot is None:
                task.set_config("num_fewshot", how.num_fewshot or 0)
            check_examples(name, task)
            if benchmark is None:
                check_documents(name, task, config.limit)
            seed_examples(task)
        # What the context has no room for is told here, before anything is asked.
        settings_of(how, model, list(loaded["tasks"].values()))
        plans.append(Plan(how, benchmark, loaded, model))
    return plans


def _tasks_of_folder(task_folder: str | None) -> frozenset[str]:
    """The names of the tasks and groups in a folder of task files."""
    if task_folder is None:
        return frozenset()
    return frozenset(_task_manager(task_folder, include_defaults=False).all_tasks)


def _find_task(name: str, task_folder: str | None) -> TaskManager:
    """Of lm_eval, where it knows the task. Raises UserError naming the nearest one."""
    # Of its own thousands of files lm_eval makes a list, which takes ten seconds, only where they are needed.
    manager = _task_manager(task_folder, include_defaults=name not in _tasks_of_folder(task_folder))
    if name not in manager.all_tasks:
        near = hint(name, [*BENCHMARKS, *manager.all_tasks], shown=len(BENCHMARKS))
        raise UserError(f"lm_eval has no task {name!r}; {near} (all of lm_eval's: lm_eval ls tasks)")
    return manager


def _task_manager(task_folder: str | None, *, include_defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    if task_folder is None:
        return _own_task_manager()
    return TaskManager(include_path=task_folder, include_defaults=include_defaults)


@functools.cache
def _own_task_manager() -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _lm_eval_tasks(how: Protocol, task_folder: str | None) -> dict[str, Any]:
    """A task or group of lm_eval's own, or of a folder of task files, which go first."""
    manager = _find_task(how.run_as, task_folder)
    with data_errors(how.name, takes_folder=False):
        loaded = manager.load([how.run_as])
    for name, task in loaded["tasks"].items():
        settle_documents(task)
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"{name} runs the code that a model writes, and not in a sandbox; humaneval, humaneval_fim and mbpp do"
            )
    return dict(loaded)


# --- Asking -----------------------------------------------------------------------------------------------------------


def _ask(plan: Plan, limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    with data_errors(plan.protocol.name, takes_folder=plan.benchmark is not None):
        found = evaluate(
            plan.model,
            plan.loaded,
            limit=limit,
            apply_chat_template=plan.protocol.chat,
            fewshot_as_multiturn=plan.protocol.chat,
            log_samples=True,
        )
    assert found is not None
    return dict(found)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without the bars and the advice of lm_eval and datasets, which say nothing that a user could act on."""
    # First, because it says what to install where lm_eval is missing, with which datasets comes.
    importlib.import_module("llada.evals.harness")
    import datasets

    log, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    shows_bars = datasets.utils.logging.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if shows_bars:
            datasets.enable_progress_bars()


# --- What came out ----------------------------------------------------------------------------------------------------


def _own_figures(found: Mapping[str, Any], place: str) -> Figures:
    """lm_eval's own."""
    return {
        f"{place}{task}/{name.replace(',', '/')}": value
        for task, metrics in found["results"].items()
        for name, value in metrics.items()
        if isinstance(value, int | float) and "," in name
    }


def _write_records(output: str, plan: Plan, found: Mapping[str, Any], place: str) -> None:
    for task, samples in found["samples"].items():
        lines = (
            json.dumps(
                {**sample, "requests": plan.model.records.get((task, sample["doc_id"]), [])},
                ensure_ascii=False,
                default=str,
            )
            + "\n"
            for sample in samples
        )
        write_bytes(join(output, "benchmarks", f"{place}{task}.jsonl"), "".join(lines).encode())
