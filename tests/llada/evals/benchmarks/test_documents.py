"""Of tasks of lm_eval's own and of a folder: what cannot be asked, and examples, which are never the question itself."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.squadv2.task import SQuAD2

from llada.errors import UserError
from llada.evals.benchmarks.documents import (
    check_documents,
    check_examples,
    or_no_document,
    seed_examples,
    settle_documents,
)

ROWS = [{"q": f"{n}?", "choices": ["yes", "no"], "label": n % 2} for n in range(6)]
CHOOSING = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "label"}
WRITING = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[label]}}",
    "generation_kwargs": {"until": []},
}


def task_of(rows: list[dict[str, Any]] = ROWS, num_fewshot: int = 0, **config: Any) -> Any:
    """A task with the splits test, validation and train, which hold the same."""
    splits = {name: datasets.Dataset.from_list(rows) for name in ("test", "validation", "train")}
    usual = {"task": "toy", "test_split": "test", "doc_to_text": "{{q}}", "num_fewshot": num_fewshot}
    return settle_documents(
        ConfigurableTask(config={"custom_dataset": lambda **_: splits, **usual, **WRITING, **config})
    )


def shown_before(task: Any, question: dict[str, Any]) -> list[str]:
    prompt = task.fewshot_context(question, num_fewshot=task.config.num_fewshot)
    *shown, asked = prompt.split("\n\n")
    assert asked == question["q"]
    return [text.split()[0] for text in shown]


@pytest.mark.parametrize("sampler", ["default", "first_n"])
@pytest.mark.parametrize(
    "splits",
    [
        {},
        {"fewshot_split": "test"},
        {"test_split": None, "validation_split": "validation"},
        {"test_split": None, "validation_split": "validation", "fewshot_split": "validation"},
        {"process_docs": lambda rows: rows.map(lambda row: {"q": f"{row['q']}?"})},
    ],
    ids=["tests", "tests by name", "validation", "validation by name", "documents made"],
)
def test_a_question_is_never_its_own_example(splits: dict[str, Any], sampler: str) -> None:
    task = task_of(num_fewshot=5, fewshot_config={"sampler": sampler}, **splits)
    check_examples("toy", task)
    seed_examples(task)
    questions = list(task.eval_docs)
    for question in questions:
        others = {other["q"] for other in questions if other != question}
        assert set(shown_before(task, question)) == others
    task.set_config("num_fewshot", 6)
    with pytest.raises(
        UserError, match=r"^toy: 6 examples asked for, and it has 5 .*; give --benchmarks\.num-fewshot 5$"
    ):
        check_examples("toy", task)


def test_examples_of_their_own_are_all_there_for_every_question() -> None:
    task = task_of(num_fewshot=6, fewshot_split="train")
    check_examples("toy", task)
    assert set(shown_before(task, task.eval_docs[0])) == {row["q"] for row in ROWS}
    samples = {"sampler": "first_n", "samples": ROWS[:2]}
    own = task_of(
        num_fewshot=2, fewshot_config=samples, test_split=None, validation_split="validation", doc_to_text="{{q}}!"
    )  # fmt: skip
    with pytest.raises(UserError, match="toy: 2 examples asked for, and it has 1"):
        check_examples("toy", own)  # of which each is a question
    others = task_of([{**row, "q": "!"} for row in ROWS], num_fewshot=2, fewshot_config=samples)
    check_examples("toy", others)
    others.set_config("num_fewshot", 3)
    with pytest.raises(UserError, match="toy: 3 examples asked for, and it has 2"):
        check_examples("toy", others)


def test_rows_that_are_alike_are_no_examples_of_each_other() -> None:
    task = task_of([*ROWS[:2], ROWS[0], ROWS[0]], num_fewshot=2)
    with pytest.raises(UserError, match="toy: 2 examples asked for, and it has 1"):
        check_examples("toy", task)


@pytest.mark.parametrize(
    ("rows", "config", "limit", "message"),
    [
        ([ROWS[0], {**ROWS[1], "label": 7}], CHOOSING, None, "document 2 .*: ValueError: 7 is none of its 2 choices"),
        ([ROWS[0], {**ROWS[1], "choices": ["a", ""]}], CHOOSING, None, "document 2 .*: a choice is empty"),
        (ROWS, {"doc_to_text": "{% if q == '3?' %}{{nosuch.x.y}}{% endif %}{{q}}"}, None, "document 4 .*: UndefinedError: 'nosuch' is"),
        (ROWS, {"doc_to_text": "{% if q == '3?' %}{{nosuch.x.y}}{% endif %}{{q}}"}, 3, ""),
        (ROWS, {"process_results": lambda doc, results: {"acc": 1 / (4 - int(doc["q"][0]))}}, None, "document 5 .*: ZeroDivisionError"),
        (ROWS, CHOOSING | {"metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}]}, None, ""),
        (ROWS, {"output_type": "loglikelihood", "generation_kwargs": None, "metric_list": [{"metric": "acc"}]}, None, ""),
        (ROWS, {"output_type": "loglikelihood_rolling", "generation_kwargs": None}, None, ""),
        (ROWS, {"num_fewshot": 3, "repeats": 2}, None, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_found_in_each_document(
    rows: list[dict[str, Any]], config: dict[str, Any], limit: int | None, message: str
) -> None:
    def check() -> None:
        check_documents("toy", task_of(rows, **config), limit)

    if message:
        with pytest.raises(UserError, match=f"^toy, {message}"):
            check()
    else:
        check()


def test_a_task_that_asks_in_two_ways_is_answered_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQuAD's asks for an answer, and how likely it is that there is none."""
    row = {"id": "1", "title": "T", "context": "C", "question": "Q?", "answers": {"text": ["C"], "answer_start": [0]}}  # fmt: skip
    splits = {name: datasets.Dataset.from_list([row, {**row, "id": "2"}]) for name in ("train", "validation")}
    monkeypatch.setattr(SQuAD2, "download", lambda self, *_, **__: setattr(self, "dataset", splits))
    task = settle_documents(SQuAD2())
    task.set_config("num_fewshot", 0)
    kinds = {request.request_type for request in task.construct_requests(row, "Q?")}
    assert kinds == {"generate_until", "loglikelihood"}
    check_documents("squadv2", task, None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LookupError("Resource 'wordnet' not found.\n  >>> import nltk\n  >>> nltk.download('wordnet')\n"), r"is judged with nltk's data, .*: python -m nltk\.downloader wordnet$"),
        (ModuleNotFoundError("No module named 'nltk'"), "needs a package that is not installed: .*No module named 'nltk'$"),
        (ValueError("no nltk in it"), "cannot be asked and judged: ValueError: no nltk in it$"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_named(error: Exception, message: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(UserError, match=f"^toy, document 1 {message}"):
        or_no_document("toy, document 1", fail)
