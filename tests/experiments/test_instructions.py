"""The experiment with few rows, as a user runs it; what is learned, what is asked, and what counts as a right answer."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from llada.data.tokens.shards import TokenDataset
from llada.model.hf import load_model
from llada.tokenizer import render_chat

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def done(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instructions")
    script.main(["--output", str(folder), "--quick"])
    return folder


@pytest.fixture(scope="module")
def experiment(script: ModuleType, done: Path):
    return script.Experiment(done, script.QUICK)


def test_every_stage_of_both_networks_has_its_numbers(script: ModuleType, done: Path):
    report = json.loads((done / "instructions.json").read_text())
    assert [(row["network"], row["stage"]) for row in report["rows"]] == list(
        itertools.product(script.NAMES, script.STAGES)
    )
    for row in report["rows"]:
        assert list(row["tasks"]) == list(script.TASKS)
        for part in (row["tasks"], row["ways"]):
            means = np.mean(list(part.values()), axis=0)
            assert means == pytest.approx(row["all"]), "each task and way is asked as often"
    assert (done / "instructions.png").stat().st_size > 10_000
    assert "| any order |" in (done / "instructions.md").read_text()
    kept = {folder.name for folder in (done / "networks").iterdir()}
    assert kept == {f"{name}-{seed}-{stage}" for name in ("llada", "autoregressive") for seed in (0, 1) for stage in ("before", "after")}  # fmt: skip


def test_instructions_are_learned_as_dialogues_of_which_the_answer_and_its_ends_count(
    experiment, script: ModuleType, done: Path
):
    dataset = TokenDataset(str(done / "instructions"), "train")
    assert dataset.kind == "sft"
    rows = dataset.rows(np.arange(len(dataset)))
    tokenizer = experiment.tokenizer
    for tokens, maskable in zip(rows.tokens, rows.maskable, strict=True):
        prompt, answer = tokens[~maskable], tokens[maskable]
        instruction = tokenizer.decode(prompt[4:-4])
        assert prompt.tolist() == render_chat(tokenizer, [{"role": "user", "content": instruction}])
        end = answer.tolist().index(experiment.eot_id)
        assert 1 <= end <= 8
        assert (answer[end + 1 :] == script.EOS).all()
        assert len(answer) > end + 1


def test_nothing_that_is_asked_is_learned(experiment, script: ModuleType, done: Path):
    texts, instructions = (TokenDataset(str(done / name), "train") for name in ("texts", "instructions"))
    told = {tuple(row) for row in texts.rows(np.arange(len(texts))).tokens.tolist()}
    forms = experiment.forms(experiment.asked)
    beginnings = {tuple(prompt) for prompt in forms["text"].prompts}
    assert all(row[:8] not in beginnings for row in told)
    learned = {tuple(row[:16]) for row in instructions.rows(np.arange(len(instructions))).tokens.tolist()}
    assert learned.isdisjoint(map(tuple, forms["instruction"].prompts))


def test_new_words_and_phrasings_are_those_that_no_instruction_has(script: ModuleType):
    import instruction_tasks as tasks

    pairs, phrasings = set(), set()
    for question in itertools.islice(tasks.instructions("train"), 4000):
        pairs |= {(question.task, word) for word in question.words}
        phrasings.add((question.task, question.instruction.replace(" ".join(question.words), "")))
    for question in tasks.asked(5):
        seen = [(question.task, word) in pairs for word in question.words]
        assert seen == [not question.is_new_word] * 4
        phrasing = question.instruction.replace(" ".join(question.words), "")
        assert ((question.task, phrasing) in phrasings) is not question.is_new_phrasing
    # All words have been in some instruction, and all frames with some verb.
    assert {word for _, word in pairs} == set(tasks.OPPOSITES)
    assert len(phrasings) == len(tasks.TASKS) * 8


def test_an_answer_is_right_when_all_of_it_is_up_to_its_end(experiment, script: ModuleType):
    import instruction_tasks as tasks

    random_numbers = random.Random(0)
    questions = [tasks.draw(task, random_numbers) for task in tasks.TASKS]
    written = [experiment.example(question) for question in questions]
    answers = [example.tokens[example.answer_start :] for example in written]
    assert experiment.are_right(questions, answers, experiment.eot_id) == [True] * 8
    assert experiment.are_right(questions, [ids[:-2] for ids in answers], experiment.eot_id) == [None] * 8
    assert experiment.are_right(questions, [ids[1:] for ids in answers], experiment.eot_id) == [False] * 8
    mixed = tasks.Question("any order", ("hot", "wet", "new", "far"), "new hot far wet")
    assert mixed.is_right("far wet new hot")
    assert not mixed.is_right("far wet new new")


def test_both_networks_answer_in_the_order_of_the_questions(experiment, script: ModuleType):
    """Whatever the lengths of the prompts and however they are put together."""
    prompts = experiment.forms(experiment.asked)["instruction"].prompts[:6]
    prompts = [prompt[-length:] for prompt, length in zip(prompts, (16, 9, 16, 12, 9, 16), strict=True)]
    for name in script.NAMES:
        network = load_model(experiment.network_folder(name, 0, "after"))
        together = script.write(name, network, prompts)
        assert together == [script.write(name, network, [prompt])[0] for prompt in prompts]


def test_the_readme_shows_the_committed_result(script: ModuleType):
    report = json.loads((HERE / "results" / "instructions.json").read_text())
    assert script.table(report) in (HERE.parents[1] / "README.md").read_text()
