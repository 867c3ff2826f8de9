"""The evaluation tasks: one row each. A new task is a file with its function and a row here."""

from __future__ import annotations

from dataclasses import asdict

from llada.errors import UserError
from llada.evals.benchmarks.run import benchmark_files, needed_benchmarks, run_benchmarks
from llada.evals.evaluation import EvaluateConfig, Task
from llada.evals.perplexity.corpora import find_corpora
from llada.evals.perplexity.generative import GENERATED_FILE, measure_generative_perplexity, needed_judge
from llada.evals.perplexity.shards import measure_perplexity
from llada.evals.perplexity.texts import measure_text_perplexity, needed_corpora
from llada.evals.reversal.task import REVERSAL_FILE, measure_reversal, needed_poems
from llada.evals.samples import write_samples
from llada.evals.understanding import UNDERSTANDING_FILE, measure_understanding, needed_rows
from llada.registry import Registry
from llada.settings import flatten_settings

TASKS: Registry[Task] = Registry(
    "evaluation task",
    {
        "perplexity": Task(
            measure_perplexity,
            needs_data=True,
            heeds=("split", "max_rows", "num_samples", "rows_per_block", "document_mask", "seed"),
        ),
        "text_perplexity": Task(
            measure_text_perplexity,
            needs_data=False,
            needs=needed_corpora,
            heeds=("texts", "num_samples", "rows_per_block", "seed"),
            reads=lambda config: [corpus.url for corpus in find_corpora(config.texts.paths)],
        ),
        "benchmarks": Task(
            run_benchmarks,
            needs_data=False,
            needs=needed_benchmarks,
            heeds=("benchmarks", "sampling"),
            reads=benchmark_files,
            reports=("benchmarks.md", "benchmarks.svg", "benchmarks/"),
        ),
        "generative_perplexity": Task(
            measure_generative_perplexity,
            needs_data=False,
            needs=needed_judge,
            heeds=("generative", "sampling", "seed"),
            reads=lambda config: (config.generative.judge, config.generative.reference),
            reports=(GENERATED_FILE,),
        ),
        "reversal": Task(
            measure_reversal,
            needs_data=False,
            needs=needed_poems,
            heeds=("poems",),
            reads=lambda config: (config.poems.data,),
            reports=(REVERSAL_FILE,),
        ),
        "understanding": Task(
            measure_understanding,
            needs_data=False,
            needs=needed_rows,
            heeds=("understanding", "seed"),
            reads=lambda config: (config.understanding.train, config.understanding.test),
            reports=(UNDERSTANDING_FILE,),
        ),
        "samples": Task(write_samples, needs_data=False, heeds=("prompts", "sampling", "seed")),
    },
)


def check_heeded(config: EvaluateConfig) -> None:
    """Raise UserError for a setting with another value than its default that none of the tasks heeds, naming those that do."""
    given, usual = (flatten_settings(asdict(each)) for each in (config, EvaluateConfig()))
    chosen = [TASKS.find(name) for name in config.tasks]
    for name, value in given.items():
        room = name.partition(".")[0]
        if name == "tasks" or value == usual.get(name) or any(_heeds(task, room) for task in chosen):
            continue
        theirs = " and ".join(other for other, task in TASKS.items() if _heeds(task, room))
        # A setting of a task that is run may have the same last name: the length of its answers, its seed.
        alike = [
            other
            for other in given
            if other.rpartition(".")[2] == name.rpartition(".")[2]
            and any(_heeds(task, other.partition(".")[0]) for task in chosen)
        ]
        raise UserError(
            f"{name}={value!r} is a setting of {theirs}, and what is run is {' and '.join(config.tasks)}: leave it out, or add to --tasks"
            + (f"; what is run has {' and '.join(alike)}" if alike else "")
        )


def _heeds(task: Task, room: str) -> bool:
    return task.heeds is None or room in task.heeds
