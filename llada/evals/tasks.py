"""The evaluation tasks: one row each. A new task is a file with its function and a row here."""

from __future__ import annotations

from llada.evals.benchmarks.run import benchmark_files, needed_benchmarks, run_benchmarks
from llada.evals.evaluation import Task
from llada.evals.perplexity.corpora import find_corpora
from llada.evals.perplexity.generative import GENERATED_FILE, measure_generative_perplexity, needed_judge
from llada.evals.perplexity.shards import measure_perplexity
from llada.evals.perplexity.texts import measure_text_perplexity, needed_corpora
from llada.evals.reversal.task import REVERSAL_FILE, measure_reversal, needed_poems
from llada.evals.samples import write_samples
from llada.evals.understanding import UNDERSTANDING_FILE, measure_understanding, needed_rows
from llada.registry import Registry

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
