"""The task "reversal": poems asked forward and in reverse, each question with its answer a line of reversal.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TypedDict

from llada.errors import UserError
from llada.evals.autoregressive.writing import never_written, write_left_to_right
from llada.evals.evaluation import Block, EvaluateConfig, Evaluation, Figures, OpenModel
from llada.evals.reversal.poems import ASKED, PUBLISHED, SAMPLING, is_right, read_questions
from llada.files import join, write_bytes
from llada.model.hf import read_config
from llada.sampling.generate import generate
from llada.sampling.text import checkpoint_tokenizer, prompt_ids, turn_end

REVERSAL_FILE = "reversal.jsonl"
_QUESTIONS_PER_BLOCK = 16


class Questions(Block):
    """Prompts that are asked together."""

    prompts: list[str]


class Answer(TypedDict):
    """What was written, and how."""

    answer: str
    nfe: int
    reveal_step: list[int]
    """The forward that wrote each token."""


def needed_poems(config: EvaluateConfig) -> str:
    """Their file. Raises UserError without one."""
    if config.poems.data is None:
        raise UserError("the task reversal needs --poems.data, a file of poems")
    return config.poems.data


def measure_reversal(evaluation: Evaluation) -> Figures:
    """{"forward": share of right answers, "forward_stderr": its standard error (of more than one poem), "reversal", "reversal_stderr",
    "poems", and "published/MODEL/forward" and "…/reversal", what the paper has}.

    Raises UserError: no poems, a checkpoint without a tokenizer or (with `poems.chat`) a chat template, or with too short a context.
    """
    config = evaluation.config.poems
    questions = read_questions(needed_poems(evaluation.config), config.limit)
    folder = evaluation.fetch_model()
    network, _ = read_config(folder)
    tokenizer = checkpoint_tokenizer(folder, network)
    if tokenizer is None:
        raise UserError(f"{evaluation.model} has no tokenizer, which the task reversal needs")
    if config.chat and tokenizer.chat_template is None:
        raise UserError(f"{evaluation.model} has no chat template: --poems.chat False asks without one")
    blocks: list[Questions] = [
        {
            "name": f"{at:06d}",
            "prompts": [question.prompt for question in questions[at : at + _QUESTIONS_PER_BLOCK]],
        }
        for at in range(0, len(questions), _QUESTIONS_PER_BLOCK)
    ]
    build = partial(open_writer, evaluation.open_model, config.chat)
    answers = [answer for part in evaluation.map_blocks(build, blocks, folder="poems") for answer in part]
    lines = [
        {**question._asdict(), "is_right": is_right(answer["answer"], question.gold), **answer}
        for question, answer in zip(questions, answers, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(join(evaluation.output, REVERSAL_FILE), text.encode())
    figures: Figures = {"poems": len(questions) // 2}
    for direction in ASKED:
        right = [bool(line["is_right"]) for line in lines if line["direction"] == direction]
        share = sum(right) / len(right)
        figures[direction] = share
        if len(right) > 1:
            figures[f"{direction}_stderr"] = (share * (1 - share) / (len(right) - 1)) ** 0.5
    for (model, direction), percent in PUBLISHED.items():
        figures[f"published/{model}/{direction}"] = percent / 100
    return figures


def open_writer(open_model: OpenModel, chat: bool) -> Callable[[Questions], list[Answer]]:
    """What answers questions in this process."""
    model, tokenizer = open_model(fast=True)
    assert tokenizer is not None  # measure_reversal has seen it

    def write(block: Questions) -> list[Answer]:
        ids = [
            prompt_ids(tokenizer, [{"role": "user", "content": prompt}] if chat else prompt)
            for prompt in block["prompts"]
        ]
        if model.config.causal:
            never = never_written(tokenizer, SAMPLING)
            rows = write_left_to_right(model, ids, SAMPLING, never_ids=never)
            steps = list(range(SAMPLING.gen_length))
            return [
                {"answer": text, "nfe": len(steps), "reveal_step": steps}
                for text in tokenizer.batch_decode(rows, skip_special_tokens=True)
            ]
        # No end: all of the canvas is the answer, as in the published code, which reads on behind the end of a turn.
        found = generate(model, ids, eos_id=None, eot_id=turn_end(tokenizer), seed=0, **asdict(SAMPLING))
        texts = tokenizer.batch_decode(found.sequences[:, -SAMPLING.gen_length :], skip_special_tokens=True)
        return [
            {"answer": text, "nfe": found.nfe, "reveal_step": step}
            for text, step in zip(texts, found.reveal_step.tolist(), strict=True)
        ]

    return write
