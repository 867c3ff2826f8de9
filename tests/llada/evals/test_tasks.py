"""The table of evaluation tasks, and what a task asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from llada.errors import UserError
from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.tasks import TASKS


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
        assert Path(task.measure.__code__.co_filename).parent == room
