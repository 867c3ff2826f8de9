"""Benchmarks whose answers are programs: the program that an answer makes, by the rules of each, run in the sandbox.

lm_eval would run them in a process that can do what the user can. These take its prompts, and the place of its metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llada.evals.benchmarks.sandbox import PASSED, run_programs

Document = Mapping[str, Any]


def complete_function(doc: Document, answer: str) -> str:
    """HumanEval: the answer goes on with the prompt."""
    return f"{doc['prompt']}{answer}\n{_check(doc)}"


def complete_function_in_block(doc: Document, answer: str) -> str:
    """HumanEval of a chat: the same, up to the end of the block of code that the prompt has opened."""
    return complete_function(doc, answer.split("```")[0])


def fill_gap(doc: Document, answer: str) -> str:
    """HumanEval-FIM: the answer stands between what is before and what is behind the gap."""
    return f"{doc['prompt']}{answer}{doc['suffix']}\n{_check(doc)}"


def whole_program(doc: Document, answer: str) -> str:
    """MBPP: the answer, then the tests."""
    return f"{answer}\n{doc.get('test_setup_code') or ''}\n" + "\n".join(doc["test_list"][:3])


def first_block(doc: Document, answer: str) -> str:
    """MBPP of a chat: the first block of code of the answer, whose opening ``` the prompt ends with; nothing where none is closed."""
    opened, fence, _ = answer.partition("```")
    if not fence:
        return whole_program(doc, "")
    head, newline, body = opened.partition("\n")
    # A word alone before the first line is the language's name.
    is_language = bool(newline) and head.isidentifier()
    return whole_program(doc, (body if is_language else opened).removeprefix("\n").removesuffix("\n"))


def _check(doc: Document) -> str:
    return f"{doc['test']}\ncheck({doc['entry_point']})"


def sandboxed(program: Callable[[Document, str], str]) -> dict[str, Any]:
    """What takes the place of lm_eval's metric in a task's configuration: each answer becomes what came of its program."""

    def run(responses: Sequence[Sequence[str]], docs: Sequence[Document]) -> Iterable[list[str]]:
        programs = [
            program(doc, answer) for answers, doc in zip(responses, docs, strict=True) for answer in answers
        ]
        outcomes = iter(run_programs(programs))
        return [[next(outcomes) for _ in answers] for answers in responses]

    return {
        "unsafe_code": False,
        "filter_list": [{"name": "sandbox", "filter": [{"function": "custom", "filter_fn": run}]}],
        "process_results": share_passed,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
    }


def share_passed(doc: Document, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of a document's answers."""
    outcomes = results[0]
    return {"pass@1": sum(outcome == PASSED for outcome in outcomes) / len(outcomes)}
