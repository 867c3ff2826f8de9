"""Benchmarks of lm_eval as one evaluation task: its prompts, its rules of what is right, our network through `harness`.

Requests go through the evaluation's pool of workers; what a worker has answered is not asked again by a rerun. Each document, with
what was asked and answered, is a line of benchmarks/TASK.jsonl in the output.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from llada.errors import UserError
from llada.evals.evaluation import BenchmarkConfig, Evaluation, Figures
from llada.files import join, write_bytes
from llada.settings import hint


def run_benchmarks(evaluation: Evaluation) -> Figures:
    """{"TASK/METRIC/FILTER": the figure}, with its standard error as "…_stderr…", and "requests_cut", how many did not fit the
    context.

    Raises UserError: no task or an unknown one, one that runs code, data that cannot be had, a checkpoint without a tokenizer.
    """
    # Here: it needs an extra, and takes seconds.
    from llada.evals.harness import HarnessModel, Setup

    config, sampling = evaluation.config.benchmarks, asdict(evaluation.config.sampling)
    del sampling["gen_length"]
    model = HarnessModel(
        str(evaluation.fetch_model()),
        Setup(evaluation.open_model, config.score, max_rows=None),
        sampling=sampling,
        gen_length=config.gen_length,
        map_blocks=evaluation.map_blocks,
    )
    found = _ask(model, config)
    figures: Figures = {}
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            if isinstance(value, int | float) and "," in name:
                figures[f"{task}/{name.replace(',', '/')}"] = value
    for task, samples in found["samples"].items():
        lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
        write_bytes(join(evaluation.output, "benchmarks", f"{task}.jsonl"), "".join(lines).encode())
    return {**figures, "requests_cut": model.num_cut}


def _ask(model: Any, config: BenchmarkConfig) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    if not config.names:
        raise UserError("the task benchmarks needs --benchmarks.names, tasks of lm_eval such as hellaswag")
    # Of its own thousands of files lm_eval makes a list, which takes ten seconds, only where they are needed.
    tasks = TaskManager(include_path=config.task_folder, include_defaults=False)
    if not set(config.names) <= set(tasks.all_tasks):
        tasks = TaskManager(include_path=config.task_folder)
    for name in config.names:
        if name not in tasks.all_tasks:
            raise UserError(f"lm_eval has no task {name!r}; {hint(name, tasks.all_tasks)}")
    try:
        found = simple_evaluate(
            model,
            tasks=list(config.names),
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            apply_chat_template=config.chat,
            fewshot_as_multiturn=config.chat,
            task_manager=tasks,
            log_samples=True,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"the data of {', '.join(config.names)} cannot be had: {' '.join(str(error).split())}"
        ) from error
    except ValueError as error:
        if "unsafe" in str(error):
            raise UserError(
                f"{', '.join(config.names)} run the code that a model writes, which is not done here"
            ) from error
        raise
    assert found is not None
    return dict(found)
