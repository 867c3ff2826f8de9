"""The papers' benchmarks as tasks of lm_eval: its prompts and rules, over files of a folder or over the hub's data sets.

A folder holds <file>.jsonl for a benchmark's documents and <file>.fewshot.jsonl for its examples, an object a line, in the fields
of lm_eval's data set or in those that `Benchmark.row` turns into them. Nothing is asked of the network then (but nltk's data, by
IFEval, where a machine has none).

Three kinds of rules are ours in the place of lm_eval's: programs are run in the sandbox (code_tasks.py), answers of MATH are
compared by math_answers.py, and where chat models write the letter of a choice it is found by OpenCompass' rules (letters.py), in
two benchmarks behind its prompts.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llada.evals.benchmarks import code_tasks, math_answers
from llada.evals.benchmarks.letters import letter_score

Row = dict[str, Any]
_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Benchmark:
    """One row of the papers' tables."""

    title: str
    """Of its row, unlike all others."""
    folder: str
    """Of lm_eval/tasks, where its tasks' files are."""
    tasks: str
    """Their names, as a pattern."""
    metric: str
    filter: str = "none"
    fields: tuple[str, ...] = ()
    """That each document must have."""
    files: tuple[str, ...] = ()
    """Their names in a folder of data, without .jsonl."""
    task_of: Callable[[Row], str] | None = None
    """Which task a document belongs to; None: there is one."""
    row: Callable[[Row], Row] = dict
    """A document in the fields of lm_eval's data set."""
    changes: Callable[[Path], dict[str, Any]] | None = None
    """What takes the place of lm_eval's in a task's configuration, given its folder, none of whose functions is then loaded."""
    has_file_of_examples: bool = True
    """False: lm_eval's prompt brings its examples, whatever stands beside the documents."""
    runs_code: bool = False
    is_mean_of_tasks: bool = False
    """Whether each task counts the same, not each document."""
    remark: str = ""
    """What a reader of the table should know of the metric."""


def _literal(folder: Path, function: str) -> list[Row]:
    """What a function of lm_eval's utils.py returns, which cannot be imported: it loads a metric from the hub, or wants other
    versions of packages."""
    module = ast.parse((folder / "utils.py").read_text())
    (found,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == function)
    (value,) = (node.value for node in found.body if isinstance(node, ast.Return) and node.value is not None)
    return list(ast.literal_eval(value))


def _arc_row(row: Row) -> Row:
    """From {choices: texts, label: index}."""
    if "answerKey" in row:
        return row
    letters = list(_LETTERS[: len(row["choices"])])
    choices = {"text": row["choices"], "label": letters}
    return {
        "id": row.get("id"),
        "question": row["question"],
        "choices": choices,
        "answerKey": letters[row["label"]],
    }


def _hellaswag_row(row: Row) -> Row:
    """From lm_eval's own {query, choices, gold}, whose text is cleaned, or the data set's {activity_label, ctx_a, …}."""
    if "query" in row:
        return {"query": row["query"], "choices": row["choices"], "label": str(row["gold"])}
    from lm_eval.tasks.hellaswag.utils import preprocess

    text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": preprocess(text),
        "choices": [preprocess(end) for end in row["endings"]],
        "label": str(row["label"]),
    }


def _hellaswag_docs(dataset: Any) -> Any:
    return dataset if "query" in dataset.features else dataset.map(_hellaswag_row)


def _truthfulqa_row(row: Row) -> Row:
    """From {answer: 0 or 1}; what is right comes first, as lm_eval counts on it."""

    def targets(answers: Mapping[str, Any]) -> Row:
        if "choices" in answers:
            return dict(answers)
        texts = sorted(answers, key=lambda text: -answers[text])
        return {"choices": texts, "labels": [answers[text] for text in texts]}

    found = {name: targets(row[name]) for name in ("mc1_targets", "mc2_targets")}
    for name, target in found.items():
        if not any(target["labels"]):
            raise ValueError(f"nothing is right in its {name}")
    return {"question": row["question"], **found}


def _math_task(row: Row) -> str:
    short = {
        "counting & probability": "counting_and_prob",
        "number theory": "num_theory",
        "precalculus": "precalc",
    }
    kind = str(row["type"]).lower()
    return f"minerva_math_{short.get(kind, kind.replace(' ', '_'))}"


def _infilling_task(row: Row) -> str:
    kind = str(row["task_id"]).split("/")[0]
    words = {
        "SingleLineInfilling": "single_line",
        "MultiLineInfilling": "multi_line",
        "RandomSpanInfilling": "random_span",
    }
    return f"humaneval_{words.get(kind, kind)}_infilling"


def _math_row(row: Row) -> Row:
    if math_answers.boxed_answer(row["solution"]) == math_answers.NO_ANSWER:
        raise ValueError(r"its solution has no \boxed{…}, where the answer stands")
    return row


def _math_docs(dataset: Any) -> Any:
    def answer(doc: Row) -> Row:
        return {"answer": math_answers.normalize(math_answers.boxed_answer(doc["solution"]))}

    return dataset.map(answer)


def _math_score(find: Callable[[str], str], doc: Row, results: Sequence[str]) -> dict[str, float]:
    answer = math_answers.normalize(find(results[0]))
    return {"exact_match": float(math_answers.is_equivalent(answer, doc["answer"]))}


def _math_changes(folder: Path) -> dict[str, Any]:
    return {
        "process_docs": _math_docs,
        "doc_to_text": "Problem:\n{{problem}}\n\nSolution:",
        "process_results": partial(_math_score, math_answers.final_answer),
        "fewshot_config": {"sampler": "first_n", "samples": _literal(folder, "list_fewshot_samples")},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _math_chat_changes(folder: Path) -> dict[str, Any]:
    return {
        **_math_changes(folder),
        "doc_to_text": "{{problem}}\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "process_results": partial(_math_score, math_answers.boxed_answer),
        "num_fewshot": 0,
    }


def _letters(choices: Sequence[str]) -> str:
    return _LETTERS[: len(choices)]


def _arc_options(doc: Mapping[str, Any]) -> tuple[str, str]:
    letters = _letters(doc["choices"]["text"])
    return letters, letters[doc["choices"]["label"].index(doc["answerKey"])]


def _hellaswag_options(doc: Mapping[str, Any]) -> tuple[str, str]:
    letters = _letters(doc["choices"])
    return letters, letters[int(doc["label"])]


def _mmlu_options(doc: Mapping[str, Any]) -> tuple[str, str]:
    letters = _letters(doc["choices"])
    return letters, letters[doc["answer"]]


def _letter_changes(options: Callable[[Mapping[str, Any]], tuple[str, str]]) -> dict[str, Any]:
    """Lettered choices, answered in words."""
    return {
        "output_type": "generate_until",
        "process_results": partial(letter_score, options),
        "generation_kwargs": {"until": ["</s>"], "do_sample": False},
        "filter_list": None,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _letter_choice(
    question: str, choices: str, options: Callable[[Mapping[str, Any]], tuple[str, str]]
) -> dict[str, Any]:
    """The same of a task that is not asked so, by one of OpenCompass' prompts."""
    lines = f"{{% for choice in {choices} %}}\n{{{{ 'ABCDEFGHIJ'[loop.index0] }}}}. {{{{ choice }}}}{{% endfor %}}"
    return {
        **_letter_changes(options),
        "doc_to_text": question.replace("CHOICES", lines),
        "doc_to_choice": None,
        "doc_to_target": lambda doc: options(doc)[1],
        "process_docs": None,
        "should_decontaminate": False,
    }


_ARC_QUESTION = "Question: {{question}}CHOICES\nAnswer:"
_HELLASWAG_QUESTION = (
    "{{query}}\nQuestion: Which ending makes the most sense?CHOICES\n"
    "You may choose from 'A', 'B', 'C', 'D'.\nAnswer:"
)


def _code_changes(program: Callable[[Mapping[str, Any], str], str], folder: Path) -> dict[str, Any]:
    changes = code_tasks.sandboxed(program)
    if folder.name == "mbpp":
        changes["fewshot_config"] = {
            "sampler": "first_n",
            "samples": _literal(folder, "list_fewshot_samples"),
        }
    return changes


def _infilling_changes(folder: Path) -> dict[str, Any]:
    """The gap as masks between what is before and what is behind it."""
    return {
        **_code_changes(code_tasks.fill_gap, folder),
        "doc_to_text": "{{prompt}}",
        "generation_kwargs": {
            "until": [],
            "do_sample": False,
            "gap": {"suffix": "suffix", "answer": "canonical_solution"},
        },
    }


_FIM: dict[str, Any] = {
    "files": tuple(f"humaneval_fim_{kind}Infilling" for kind in ("SingleLine", "MultiLine", "RandomSpan")),
    "task_of": _infilling_task,
    "is_mean_of_tasks": True,
}
_CODE: dict[str, Any] = {
    "metric": "pass@1",
    "filter": "sandbox",
    "runs_code": True,
    "has_file_of_examples": False,
}
_MULTIPLE = ("question", "A", "B", "C", "D", "answer", "subject")
_GPQA = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_EQUAL = "answers are compared as expressions (math_answers.py), not as texts"
_NORM = "acc_norm, inferred from LLaMA3's row of the paper's table"

BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": Benchmark(
        "MMLU", "mmlu/default", "mmlu_*", "acc", fields=("question", "choices", "answer", "subject"),
        task_of=lambda row: f"mmlu_{row['subject']}",
    ),
    "bbh": Benchmark(
        "BBH", "bbh/cot_fewshot", "bbh_cot_fewshot_*", "exact_match", "get-answer", fields=("task", "input", "target"),
        task_of=lambda row: f"bbh_cot_fewshot_{row['task']}", has_file_of_examples=False,
    ),
    "arc_challenge": Benchmark(
        "ARC-C", "arc", "arc_challenge", "acc_norm", fields=("question", "choices"), row=_arc_row, remark=_NORM
    ),
    "hellaswag": Benchmark(
        "HellaSwag", "hellaswag", "hellaswag", "acc_norm", row=_hellaswag_row, remark=_NORM,
        changes=lambda folder: {"process_docs": _hellaswag_docs},
    ),
    "truthfulqa": Benchmark(
        "TruthfulQA", "truthfulqa", "truthfulqa_mc2", "acc", fields=("question", "mc1_targets", "mc2_targets"),
        files=("truthfulqa_mc",), row=_truthfulqa_row, remark="mc2",
    ),
    "winogrande": Benchmark(
        "WinoGrande", "winogrande", "winogrande", "acc", fields=("sentence", "option1", "option2", "answer")
    ),
    "piqa": Benchmark("PIQA", "piqa", "piqa", "acc_norm", fields=("goal", "sol1", "sol2", "label"), remark=_NORM),
    "gsm8k": Benchmark(
        "GSM8K", "gsm8k", "gsm8k", "exact_match", "flexible-extract", fields=("question", "answer"),
        remark="the last number of the text (flexible-extract)",
    ),
    "math": Benchmark(
        "MATH", "minerva_math", "minerva_math_[a-z]*", "exact_match", fields=("problem", "solution", "type"),
        task_of=_math_task, row=_math_row, changes=_math_changes, has_file_of_examples=False,
        remark=_EQUAL,
    ),
    "gpqa": Benchmark("GPQA", "gpqa/n_shot", "gpqa_main_n_shot", "acc", fields=_GPQA),
    "humaneval": Benchmark(
        "HumanEval", "humaneval", "humaneval", fields=("prompt", "test", "entry_point"),
        changes=partial(_code_changes, code_tasks.complete_function), **_CODE,
    ),
    "humaneval_fim": Benchmark(
        "HumanEval-FIM", "humaneval_infilling", "humaneval_*_infilling",
        fields=("task_id", "prompt", "suffix", "test", "entry_point"), changes=partial(_code_changes, code_tasks.fill_gap),
        remark="mean of the single-line, multi-line and random-span sets", **_FIM, **_CODE,
    ),
    # The same documents as a masked-diffusion network can have them: prompt, masks, suffix.
    "humaneval_fim_masks": Benchmark(
        "HumanEval-FIM (masks)", "humaneval_infilling", "humaneval_*_infilling",
        fields=("task_id", "prompt", "suffix", "canonical_solution", "test", "entry_point"), changes=_infilling_changes,
        remark="mean of the three sets; the gap is filled as masks between prompt and suffix, as many as its solution has tokens "
        "unless gen_length is given",
        **_FIM, **_CODE,
    ),
    "mbpp": Benchmark(
        "MBPP", "mbpp", "mbpp", fields=("text", "test_list"),
        changes=partial(_code_changes, code_tasks.whole_program), **_CODE,
    ),
    "cmmlu": Benchmark(
        "CMMLU", "cmmlu", "cmmlu_*", "acc", fields=("Question", "A", "B", "C", "D", "Answer", "subject"),
        task_of=lambda row: f"cmmlu_{row['subject']}",
    ),
    "ceval": Benchmark(
        "C-Eval", "ceval", "ceval-valid_*", "acc", fields=_MULTIPLE, task_of=lambda row: f"ceval-valid_{row['subject']}"
    ),
    "mmlu_pro": Benchmark(
        "MMLU-Pro", "mmlu_pro", "mmlu_pro_*", "exact_match", "custom-extract",
        fields=("question", "options", "answer", "category"),
        task_of=lambda row: f"mmlu_pro_{row['category'].replace(' ', '_')}",
    ),
    "ifeval": Benchmark(
        "IFEval", "ifeval", "ifeval", "prompt_level_strict_acc", fields=("prompt", "instruction_id_list", "kwargs")
    ),
    # The same documents, answered in words: for chat models.
    "mmlu_generative": Benchmark(
        "MMLU (generative)", "mmlu/generative", "mmlu_*_generative", "exact_match",
        fields=("question", "choices", "answer", "subject"), files=("mmlu",),
        task_of=lambda row: f"mmlu_{row['subject']}_generative", changes=lambda folder: _letter_changes(_mmlu_options),
    ),
    "hellaswag_generative": Benchmark(
        "HellaSwag (generative)", "hellaswag", "hellaswag", "exact_match", files=("hellaswag",), row=_hellaswag_row,
        changes=lambda folder: {
            **_letter_choice(_HELLASWAG_QUESTION, "choices", _hellaswag_options), "process_docs": _hellaswag_docs
        },
    ),
    "arc_challenge_generative": Benchmark(
        "ARC-C (generative)", "arc", "arc_challenge", "exact_match", fields=("question", "choices"),
        files=("arc_challenge",), row=_arc_row,
        changes=lambda folder: _letter_choice(_ARC_QUESTION, "choices.text", _arc_options),
    ),
    "math_chat": Benchmark(
        "MATH (chat)", "minerva_math", "minerva_math_[a-z]*", "exact_match", fields=("problem", "solution", "type"),
        files=("math",), task_of=_math_task, row=_math_row, changes=_math_chat_changes, has_file_of_examples=False,
        remark=rf"the last \boxed{{…}} of the text; {_EQUAL}",
    ),
    "gpqa_generative": Benchmark(
        "GPQA (generative)", "gpqa/generative", "gpqa_main_generative_n_shot", "exact_match", "flexible-extract", fields=_GPQA,
        files=("gpqa",),
    ),
    "humaneval_instruct": Benchmark(
        "HumanEval (instruct)", "humaneval", "humaneval_instruct", fields=("prompt", "test", "entry_point"), files=("humaneval",),
        changes=partial(_code_changes, code_tasks.complete_function_in_block), **_CODE,
    ),
    "mbpp_instruct": Benchmark(
        "MBPP (instruct)", "mbpp", "mbpp_instruct", fields=("text", "test_list"), files=("mbpp",),
        changes=partial(_code_changes, code_tasks.first_block), **_CODE,
    ),
}  # fmt: skip
