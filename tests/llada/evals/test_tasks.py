"""The table of evaluation tasks, and what a task asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llada.errors import UserError
from llada.evals.benchmarks.config import BenchmarkConfig
from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.perplexity.corpora import TextsConfig
from llada.evals.perplexity.judge import GenerativeConfig
from llada.evals.requests.scoring import ScoreConfig
from llada.evals.reversal.poems import PoemsConfig
from llada.evals.tasks import TASKS, check_heeded
from llada.sampling.config import SamplingConfig
from llada.understanding.config import UnderstandingConfig


def evaluation(config: EvaluateConfig) -> Evaluation:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked for before the settings were looked at")

    return Evaluation(config, "some/model", never, None, "out", never, never)  # type: ignore[arg-type]


def test_the_defaults_are_tasks_and_a_misspelt_one_is_named() -> None:
    assert set(EvaluateConfig().tasks) <= set(TASKS)
    with pytest.raises(UserError, match="there is no evaluation task 'perplexty'; did you mean 'perplexity'"):
        TASKS.find("perplexty")


def test_a_task_that_needs_data_says_so() -> None:
    assert {name for name, task in TASKS.items() if task.needs_data} == {"perplexity"}
    with pytest.raises(UserError, match=r"some/model: this task needs a prepared folder \(--data\)"):
        TASKS["perplexity"].measure(evaluation(EvaluateConfig()))


def test_every_task_is_in_a_file_of_this_room() -> None:
    room = Path(__file__).resolve().parents[3] / "llada" / "evals"
    for task in TASKS.values():
        assert room in Path(task.measure.__code__.co_filename).parents


def test_what_a_task_reads_is_what_its_settings_name(tmp_path: Path) -> None:
    assert not any(url for task in TASKS.values() for url in task.reads(EvaluateConfig()))
    (tmp_path / "ptb.txt").write_text("x")
    (tmp_path / "rows").mkdir()
    for name in ("mmlu", "mmlu.fewshot", "truthfulqa_mc", "piqa"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text("{}")
    config = EvaluateConfig(
        texts=TextsConfig((str(tmp_path),)),
        poems=PoemsConfig("poems.jsonl"),
        benchmarks=BenchmarkConfig(("mmlu", "truthfulqa", "some_task"), data=f"{tmp_path}/rows"),
        generative=GenerativeConfig("judge"),
        understanding=UnderstandingConfig("train.jsonl", "test.jsonl"),
    )
    read = {name: [url for url in task.reads(config) if url] for name, task in TASKS.items()}
    assert {name: urls for name, urls in read.items() if urls} == {
        "text_perplexity": [f"{tmp_path}/ptb.txt"],
        "benchmarks": [f"{tmp_path}/rows/{name}.jsonl" for name in ("mmlu", "mmlu.fewshot", "truthfulqa_mc")],
        "generative_perplexity": ["judge"],
        "reversal": ["poems.jsonl"],
        "understanding": ["train.jsonl", "test.jsonl"],
    }


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        (
            ("samples",),
            {"benchmarks": BenchmarkConfig(("mmlu",))},
            r"^benchmarks\.names=\('mmlu',\) is a setting of benchmarks, and what is run is samples: leave it out",
        ),
        (
            ("benchmarks",),
            {"num_samples": 8},
            r"^num_samples=8 is a setting of perplexity and text_perplexity, .* has benchmarks\.score\.num_samples$",
        ),
        (("benchmarks",), {"seed": 7}, r"^seed=7 is a setting of .* has benchmarks\.score\.seed$"),
        (
            ("reversal", "perplexity"),
            {"sampling": SamplingConfig(fixed={0: 5})},
            r"^sampling\.fixed.* is a setting of benchmarks and generative_perplexity and samples, and what is run is reversal and",
        ),
        (("perplexity",), {"poems": PoemsConfig(chat=False)}, r"^poems\.chat=False is a setting of reversal"),
    ],
    ids=str,
)
def test_a_setting_of_a_task_that_is_not_run_is_named(
    tasks: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_heeded(EvaluateConfig(tasks, **settings))


def test_settings_of_the_tasks_that_are_run_and_defaults_pass() -> None:
    for name in TASKS:
        check_heeded(EvaluateConfig((name,)))
    benchmarks = BenchmarkConfig(("mmlu",), score=ScoreConfig(seed=3))
    check_heeded(EvaluateConfig(("samples", "benchmarks"), seed=7, benchmarks=benchmarks, prompts=("A",)))
