"""Every benchmark of the papers, built from files: its prompts are lm_eval's or the papers', byte by byte."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import apply_template

from llada.errors import UserError
from llada.evals.benchmarks.build import build_tasks
from llada.evals.benchmarks.catalogue import BENCHMARKS

LM_EVAL = Path(lm_eval.tasks.__file__).parent


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@functools.cache
def tasks_of(name: str, data: Path, num_fewshot: int | None = None) -> dict[str, Any]:
    """{name: task}; made once."""
    tasks = build_tasks(name, data=str(data), num_fewshot=num_fewshot, allow_code_execution=True)
    return {task.task_name: task for task in tasks}


def prompt_of(task: Any, number: int = 0) -> Any:
    task.set_fewshot_seed(1234)
    return task.fewshot_context(task.eval_docs[number], num_fewshot=task.config.num_fewshot or 0)


def config_of(name: str) -> dict[str, Any]:
    """A task's configuration as lm_eval has it, its functions as names."""
    (path,) = LM_EVAL.glob(name)
    return load_yaml(path, resolve_func=False)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in ("mmlu", "cmmlu", "ceval")])
def test_every_benchmark_loads_and_asks(name: str, data: Path) -> None:
    num_rows = sum(
        len((data / f"{stem}.jsonl").read_text().splitlines()) for stem in BENCHMARKS[name].files or (name,)
    )
    tasks = tasks_of(name, data, *([0] if name in ("mmlu_pro", "gsm8k") else []))
    assert sum(len(task.eval_docs) for task in tasks.values()) == num_rows
    for task in tasks.values():
        prompt = prompt_of(task)
        for text in prompt if isinstance(prompt, list) else [prompt]:
            assert text
            assert "{{" not in text.replace("{{}}", "")
        # A metric that the table wants is one that the task has.
        assert BENCHMARKS[name].metric in {*task._metric_fn_list, *task._aggregation_list}


def test_no_two_rows_of_a_table_have_one_title() -> None:
    assert len({benchmark.title for benchmark in BENCHMARKS.values()}) == len(BENCHMARKS)


@pytest.mark.parametrize("name", ["mmlu", "cmmlu", "ceval"])
def test_subjects_ask_five_questions_of_their_own_before(name: str, data: Path) -> None:
    tasks = tasks_of(name, data, num_fewshot=5)
    assert len(tasks) == 3
    examples = [json.loads(line) for line in (data / f"{name}.fewshot.jsonl").read_text().splitlines()]
    for task_name, task in tasks.items():
        config = config_of(f"{'mmlu/default' if name == 'mmlu' else name}/{task_name}.yaml")
        subject = config["dataset_name"]
        own = [row for row in examples if row["subject"] == subject][:5]
        assert len(own) == 5
        turns = []
        for row in own:
            answer = row.get("answer", row.get("Answer"))
            letter = answer if isinstance(answer, str) else "ABCD"[answer]
            turns.append(f"{apply_template(config['doc_to_text'], row)} {letter}\n\n")
        asked = apply_template(config["doc_to_text"], task.eval_docs[0])
        assert prompt_of(task) == config["description"] + "".join(turns) + asked


def test_reasoning_prompts_are_those_of_their_authors(data: Path) -> None:
    """BIG-Bench Hard's own repository has each prompt as a text."""
    tasks = tasks_of("bbh", data)
    prompts = {}
    for line in (data / "bbh.fewshot.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompts[row["task"]] = row["prompt"].split("-----\n", 1)[1]  # behind the canary
    assert len(tasks) == 3
    for name, task in tasks.items():
        doc = task.eval_docs[0]
        theirs = prompts[name.removeprefix("bbh_cot_fewshot_")].strip()
        assert prompt_of(task) == f"{theirs}\n\nQ: {doc['input']}\nA: Let's think step by step.\n"


def test_questions_and_their_answers_stand_as_lm_eval_has_them(data: Path) -> None:
    """Written out by hand after lm_eval's files of tasks, from the rows as they are stored."""
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in data.glob("*.jsonl")
    }
    arc, row = tasks_of("arc_challenge", data)["arc_challenge"], rows["arc_challenge"][1]
    assert prompt_of(arc, 1) == f"Question: {row['question']}\nAnswer:"
    assert arc.doc_to_choice(arc.eval_docs[1]) == row["choices"]
    assert arc.doc_to_target(arc.eval_docs[1]) == row["label"]
    hella, row = tasks_of("hellaswag", data)["hellaswag"], rows["hellaswag"][1]
    assert (prompt_of(hella, 1), hella.doc_to_choice(hella.eval_docs[1])) == (row["query"], row["choices"])
    assert hella.doc_to_target(hella.eval_docs[1]) == row["gold"]
    piqa, row = tasks_of("piqa", data)["piqa"], rows["piqa"][1]
    assert prompt_of(piqa, 1) == f"Question: {row['goal']}\nAnswer:"
    assert piqa.doc_to_choice(piqa.eval_docs[1]) == [row["sol1"], row["sol2"]]
    true, row = tasks_of("truthfulqa", data)["truthfulqa_mc2"], rows["truthfulqa_mc"][1]
    assert prompt_of(true, 1).startswith(
        "Q: What is human life expectancy in the United States?\nA: Human life"
    )
    assert prompt_of(true, 1).endswith(f"Barcelona, Spain.\n\nQ: {row['question']}\nA:")
    choices = true.doc_to_choice(true.eval_docs[1])
    assert {text: row["mc2_targets"][text] for text in choices} == row["mc2_targets"]
    # Two contexts, one continuation.
    wino, row = tasks_of("winogrande", data, 0)["winogrande"], rows["winogrande"][1]
    before, behind = row["sentence"].split("_")
    assert prompt_of(wino, 1) == [before + row["option1"], before + row["option2"]]
    assert wino.doc_to_target(wino.eval_docs[1]) == behind.strip()
    assert wino.doc_to_text(wino.eval_docs[1]) == int(row["answer"]) - 1
    gsm, row = tasks_of("gsm8k", data, 4)["gsm8k"], rows["gsm8k"][1]
    pool = {f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows["gsm8k.fewshot"]}
    *shown, asked = prompt_of(gsm, 1).split("\n\nQuestion: ")
    assert asked == f"{row['question']}\nAnswer:"
    assert len(shown) == 4
    assert {f"Question: {text.removeprefix('Question: ')}" for text in shown} <= pool


def literal(folder: str, function: str) -> Any:
    """What one of lm_eval's functions returns whose module cannot be imported here."""
    module = ast.parse((LM_EVAL / folder / "utils.py").read_text())
    (found,) = (node for node in module.body if getattr(node, "name", "") == function)
    (value,) = (node.value for node in found.body if isinstance(node, ast.Return))
    return ast.literal_eval(value)


def test_mathematics_and_code_are_asked_as_lm_eval_does(data: Path) -> None:
    shots = literal("minerva_math", "list_fewshot_samples")
    for task in tasks_of("math", data).values():
        doc = task.eval_docs[0]
        turns = [f"Problem:\n{row['problem']}\n\nSolution: {row['solution']}\n\n" for row in shots]
        assert prompt_of(task) == "".join(turns) + f"Problem:\n{doc['problem']}\n\nSolution:"
    human = tasks_of("humaneval", data)["humaneval"]
    assert prompt_of(human) == human.eval_docs[0]["prompt"]
    assert human.config.generation_kwargs["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    filled = tasks_of("humaneval_fim", data)
    assert set(filled) == {
        f"humaneval_{kind}_infilling" for kind in ("single_line", "multi_line", "random_span")
    }
    for task in filled.values():
        doc = task.eval_docs[0]
        assert prompt_of(task) == f"{doc['suffix']}\n\n{doc['prompt']}"
    for name, task in tasks_of("humaneval_fim_masks", data).items():
        # The gap is masks between the two; nothing else is said.
        doc = task.eval_docs[0]
        assert prompt_of(task) == doc["prompt"]
        wishes = task.config.generation_kwargs
        assert (wishes["gap"]["suffix"], wishes["gap"]["answer"], wishes["until"]) == (
            "suffix", "canonical_solution", []
        )  # fmt: skip
        assert doc["prompt"] + doc["canonical_solution"] + doc["suffix"] == next(
            row["prompt"] + row["canonical_solution"] + row["suffix"]
            for row in filled[name].eval_docs
            if row["task_id"] == doc["task_id"]
        )
    mbpp = tasks_of("mbpp", data)["mbpp"]
    doc = mbpp.eval_docs[0]

    def ask(row: dict[str, Any]) -> str:
        tests = "\n".join(row["test_list"])
        intro = "You are an expert Python programmer, and here is your task: "
        return f"{intro}{row['text']} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"

    shots = literal("mbpp", "list_fewshot_samples")
    assert [row["task_id"] for row in shots] == [2, 3, 4]
    turns = [f"{ask(row)}{row['code']}\n[DONE]\n\n" for row in shots]
    assert prompt_of(mbpp) == "".join(turns) + ask(doc)
    stored = {
        row["task_id"]: row for row in map(json.loads, (data / "mbpp.fewshot.jsonl").read_text().splitlines())
    }
    assert all(stored[row["task_id"]]["code"] == row["code"] for row in shots)


def test_chat_prompts_with_letters_are_opencompass(data: Path) -> None:
    arc = tasks_of("arc_challenge_generative", data)["arc_challenge"]
    doc = arc.eval_docs[0]
    a, b, c, d = doc["choices"]["text"]
    assert prompt_of(arc) == f"Question: {doc['question']}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
    assert arc.doc_to_target(doc) == doc["answerKey"]
    hella = tasks_of("hellaswag_generative", data)["hellaswag"]
    doc = hella.eval_docs[0]
    a, b, c, d = doc["choices"]
    assert prompt_of(hella) == (
        f"{doc['query']}\nQuestion: Which ending makes the most sense?\nA. {a}\nB. {b}\nC. {c}\nD. {d}\n"
        "You may choose from 'A', 'B', 'C', 'D'.\nAnswer:"
    )
    assert hella.doc_to_target(doc) == "ABCD"[int(doc["label"])]
    chat = tasks_of("math_chat", data)
    doc = next(iter(chat.values())).eval_docs[0]
    assert prompt_of(next(iter(chat.values()))) == (
        f"{doc['problem']}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    )


def extracted(task: Any, filter_name: str, answer: str) -> Any:
    (ensemble,) = (rule for rule in task._filters if rule.name == filter_name)
    responses: Any = [[answer]]
    for make in ensemble.filters:
        responses = list(make().apply(responses, [task.eval_docs[0]]))
    return responses[0]


@pytest.mark.parametrize(
    ("name", "answer", "found"),
    [
        ("gsm8k", "So 3 + 4 = 7.\n#### 7", "7"),
        ("gsm8k", "He pays $1,234.50 in all.", "$1,234.50"),
        ("gsm8k", "It is -5, or 12 apples", "12"),
        ("gsm8k", "no number", "[invalid]"),
        ("bbh", "So the answer is (B).", "(B)"),
        ("bbh", "the answer is True. So the answer is False.", "True. So the answer is False"),
        ("bbh", "It is False.", "[invalid]"),
        ("mmlu_pro", "The answer is (J).", "J"),
        ("mmlu_pro", "the answer is B", "B"),
        ("mmlu_pro", "I choose B", "[invalid]"),
        ("gpqa_generative", "It is (B), not (C)", "(C)"),
    ],
)
def test_answers_are_found_by_the_published_rules(name: str, answer: str, found: str, data: Path) -> None:
    shots = 0 if name in ("gsm8k", "mmlu_pro") else None
    task = next(iter(tasks_of(name, data, shots).values()))
    assert extracted(task, BENCHMARKS[name].filter, answer) == found


def test_judgements_are_those_of_the_rules(data: Path) -> None:
    gsm = tasks_of("gsm8k", data, 0)["gsm8k"]
    doc = {"question": "?", "answer": "work\n#### 1,234"}
    assert [gsm.process_results(doc, [text])["exact_match"] for text in ("1234", "$1,234.", "1235")] == [
        1,
        1,
        0,
    ]
    math = next(iter(tasks_of("math", data).values()))
    assert math.process_results({"answer": "[invalidanswer]"}, ["no answer"])["exact_match"] == 0.0
    doc = {"answer": r"\frac{1}{2}"}
    said = "Final Answer: The final answer is ${}$. I hope it is correct."
    right = [math.process_results(doc, [said.format(x)])["exact_match"] for x in (r"\frac12", "0.5", "2")]
    assert right == [1.0, 1.0, 0.0]
    assert math.process_results(doc, [r"\boxed{\frac12}"])["exact_match"] == 0.0
    chat = next(iter(tasks_of("math_chat", data).values()))
    assert chat.process_results(doc, [r"so \boxed{\frac12}"])["exact_match"] == 1.0
    for name in ("arc_challenge_generative", "hellaswag_generative", "mmlu_generative"):
        letters = next(iter(tasks_of(name, data).values()))
        doc = letters.eval_docs[0]
        right = letters.doc_to_target(doc)
        for said in ("{}", "\n{}. It is", "I think the answer is {}."):
            judged = [letters.process_results(doc, [said.format(x)])["exact_match"] for x in "ABCD"]
            assert judged == [float(x == right) for x in "ABCD"], (name, said)
    strict = tasks_of("ifeval", data)["ifeval"]
    words = [strict.process_results(strict.eval_docs[0], [text]) for text in ("One", "One, two", "")]
    assert [found["prompt_level_strict_acc"] for found in words] == [True, False, False]


def test_canonical_programs_pass_in_the_sandbox(data: Path) -> None:
    for name in ("humaneval", "humaneval_fim_masks", "mbpp"):
        for task in tasks_of(name, data).values():
            docs = list(task.eval_docs)[:3]
            answers = [[doc.get("canonical_solution", doc.get("code"))] for doc in docs]
            (rule,) = (rule["filter"][0] for rule in task.config.filter_list)
            assert list(rule["filter_fn"](answers, docs)) == [["passed"]] * 3


INSTRUCTION = {"key": 1, "prompt": "Say.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


BAD: list[tuple[str, Callable[[Path], Any], dict[str, Any], str]] = [
    ("gsm8k", lambda folder: None, {}, r"gsm8k: there is no .*gsm8k\.jsonl; put its documents there"),
    ("gsm8k", lambda folder: (folder / "gsm8k.jsonl").write_text("{"), {}, r"gsm8k\.jsonl, line 1 is no JSON"),
    (
        "piqa",
        lambda folder: (folder / "piqa.jsonl").write_text('{"goal": "x", "sol1": "a", "label": 0}\n'),
        {},
        r"piqa\.jsonl, row 1 has no 'sol2', which PIQA needs",
    ),
    (
        "mmlu",
        lambda folder: (folder / "mmlu.jsonl").write_text(
            json.dumps({"question": "?", "choices": ["a"] * 4, "answer": 0, "subject": "anatomi"})
        ),
        {},
        r"row 1: MMLU has no task 'mmlu_anatomi'; did you mean 'mmlu_anatomy'",
    ),
    (
        "arc_challenge",
        lambda folder: (folder / "arc_challenge.jsonl").write_text('{"question": "?", "choices": ["a"], "label": 4}\n'),
        {},
        r"row 1 is no document of ARC-C",
    ),
    (
        "piqa",
        lambda folder: (folder / "piqa.jsonl").write_text('{"goal": "x", "sol1": "a", "sol2": "b", "label": 0}\n'),
        {"num_fewshot": 2},
        "piqa: 2 examples asked for, and 0 are in .*; give --benchmarks.num-fewshot 0",
    ),
    (
        "mbpp",
        lambda folder: (folder / "mbpp.jsonl").write_text('{"text": "x", "test_list": ["a", "b", "c"]}\n'),
        {"num_fewshot": 4},
        "mbpp: 4 examples asked for, and lm_eval's prompt has 3",
    ),
    (
        "gsm8k",
        lambda folder: (folder / "gsm8k.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n'),
        {},
        "gsm8k: 5 examples asked for, and 0 are in",
    ),
    (
        "mmlu_pro",
        lambda folder: (folder / "mmlu_pro.jsonl").write_text(
            json.dumps({"question": "?", "options": ["a", "b"], "answer": "A", "answer_index": 0, "category": "law"})
        ),
        {},
        "mmlu_pro: 5 examples asked for, and 0 are in",
    ),
    (
        "gpqa",
        lambda folder: write(folder, "gpqa", {
            "Question": "?", "Correct Answer": "a", **{f"Incorrect Answer {n}": "b" for n in (1, 2, 3)}
        }),
        {"num_fewshot": 1},
        "gpqa: 1 examples asked for, and 0 are in .*, or more rows",
    ),
    ("ifeval", lambda folder: write(folder, "ifeval", INSTRUCTION), {"num_fewshot": 1}, "ifeval: 1 examples asked for, and 0 are in"),
    (
        "math",
        lambda folder: write(folder, "math", {"problem": "?", "solution": "two", "type": "Algebra", "level": "Level 1"}),
        {"num_fewshot": 0},
        r"row 1 is no document of MATH: its solution has no \\boxed",
    ),
    ("gsm8k", lambda folder: write(folder, "gsm8k", {"question": None, "answer": "#### 1"}), {}, "row 1: 'question', which GSM8K needs, is null"),
    (
        "piqa",
        lambda folder: write(folder, "piqa", {"goal": "x", "sol1": "a", "sol2": "b", "label": -1}),
        {},
        r"piqa\.jsonl, row 1 cannot be asked and judged: ValueError: -1 is none of its 2 choices",
    ),
    (
        "piqa",
        lambda folder: write(
            folder, "piqa", *({"goal": "x", "sol1": "a", "sol2": "b", "label": label} for label in (0, 1, 7))
        ),
        {},
        r"piqa\.jsonl, row 3 cannot be asked and judged: ValueError: 7 is none of its 2 choices",
    ),
    (
        "piqa",
        lambda folder: write(
            folder, "piqa", *({"goal": "x", "sol1": "a", "sol2": "b", "label": label} for label in (0, "1"))
        ),
        {},
        r"piqa: from .*piqa\.jsonl, row 1 on, a field has values of unlike kinds",
    ),
    (
        "hellaswag",
        lambda folder: write(folder, "hellaswag", {"query": "x", "choices": ["a", "b", "c", "d"], "gold": ""}),
        {},
        r"hellaswag\.jsonl, row 1 cannot be asked and judged",
    ),
    (
        "truthfulqa",
        lambda folder: write(
            folder, "truthfulqa_mc",
            {"question": "?", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 0, "b": 0}},
        ),
        {},
        "row 1 is no document of TruthfulQA: nothing is right in its mc2_targets",
    ),
    (
        "winogrande",
        lambda folder: write(folder, "winogrande", {"sentence": "A _ b", "option1": "a", "option2": "b", "answer": "3"}),
        {},
        r"winogrande\.jsonl, row 1 cannot be asked and judged: KeyError",
    ),
    (
        "arc_challenge",
        lambda folder: write(folder, "arc_challenge", {"question": "?", "choices": ["a", ""], "label": 0}),
        {},
        "row 1 cannot be asked and judged: IndexError",
    ),
    (
        "mmlu_pro",
        lambda folder: write(folder, "mmlu_pro", {"question": "?", "options": ["a"], "answer": "A", "category": 3}),
        {},
        "row 1 is no document of MMLU-Pro",
    ),
    (
        "ifeval",
        lambda folder: write(folder, "ifeval", {**INSTRUCTION, "instruction_id_list": ["punctuation:no_such"]}),
        {},
        "row 1 cannot be asked and judged: KeyError: 'punctuation:no_such'",
    ),
    (
        "ifeval",
        lambda folder: write(folder, "ifeval", {**INSTRUCTION, "kwargs": []}),
        {},
        "row 1 cannot be asked and judged: IndexError",
    ),
    (
        "humaneval",
        lambda folder: None,
        {"allow_code_execution": False},
        "humaneval runs the programs that the model writes, in a sandbox; allow it with --benchmarks.allow-code-execution",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "prepare", "changes", "message"),
    BAD,
    ids=[f"{number}-{row[0]}" for number, row in enumerate(BAD)],
)
def test_what_is_wrong_with_the_data_is_one_line(
    tmp_path: Path, name: str, prepare: Callable[[Path], Any], changes: dict[str, Any], message: str
) -> None:
    prepare(tmp_path)
    given: dict[str, Any] = {"num_fewshot": None, "allow_code_execution": True, **changes}
    with pytest.raises(UserError, match=message) as caught:
        build_tasks(name, data=str(tmp_path), **given)
    assert "\n" not in str(caught.value)


def test_experts_knowledge_and_instructions_are_asked_as_lm_eval_does(data: Path) -> None:
    """Written out by hand after its files. GPQA's answers are in an order of its own, the same each time."""
    for name, task_name in (("gpqa", "gpqa_main_n_shot"), ("gpqa_generative", "gpqa_main_generative_n_shot")):
        task = tasks_of(name, data)[task_name]
        intro = (
            "Here are some example questions from experts. Answer the final question yourself, following the format of the "
            "previous questions exactly.\n"
        )
        for doc in task.eval_docs:
            choices = [doc[f"choice{n}"] for n in (1, 2, 3, 4)]
            assert sorted(choices) == ["all", "none", "that", "this"]
            assert doc["answer"] == f"({'ABCD'[choices.index('this')]})"
        doc = task.eval_docs[0]
        lines = "\n".join(f"({letter}) {doc[f'choice{n}']}" for n, letter in enumerate("ABCD", start=1))
        assert prompt_of(task) == f"{intro}Question: Which is it?\nChoices:\n{lines}\nAnswer:"
        (again,) = build_tasks(name, data=str(data), num_fewshot=None, allow_code_execution=False)
        assert list(again.eval_docs) == list(task.eval_docs)
    pro = tasks_of("mmlu_pro", data, 2)["mmlu_pro_computer_science"]
    intro = (
        "The following are multiple choice questions (with answers) about computer science. Think step by step and then finish "
        'your answer with "the answer is (X)" where X is the correct letter choice.\n'
    )
    question = "Question:\nHow much is 1 + 1?\nOptions:\nA. 1\nB. 2\nC. 3\nAnswer: Let's think step by step."
    shown = f"{question} It is 2. The answer is (B).\n\n"
    assert prompt_of(pro) == intro + 2 * shown + question
    told = tasks_of("ifeval", data)["ifeval"]
    assert prompt_of(told) == "Write a word. Use no comma."
    letters = tasks_of("mmlu_generative", data, 0)
    config = config_of(f"mmlu/generative/{next(iter(letters)).removesuffix('_generative')}.yaml")
    task = next(iter(letters.values()))
    doc = task.eval_docs[0]
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"], strict=True))
    assert prompt_of(task) == f"{config['description']}{doc['question'].strip()}\n{lines}\nAnswer:"
    human = tasks_of("humaneval_instruct", data)["humaneval_instruct"]
    doc = human.eval_docs[0]
    ask = "Write a solution to the following problem and make sure that it passes the tests:"
    assert human.doc_to_text(doc) == f"{ask}\n```python\n{doc['prompt']}\n```\n"
    mbpp = tasks_of("mbpp_instruct", data)["mbpp_instruct"]
    doc = mbpp.eval_docs[0]
    ask, tests = (
        "You are an expert Python programmer, and here is your task:",
        "\n".join(doc["test_list"][:3]),
    )
    assert mbpp.doc_to_text(doc) == f"{ask}\n{doc['text']}\nYour code should pass these tests:\n{tests}"
