"""The task "reversal" end to end on a small network: what it writes is the sampler's, and what is right is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import llada
from llada.errors import UserError
from llada.evals.evaluation import EvaluateConfig, Evaluation
from llada.evals.reversal.poems import SAMPLING, PoemsConfig, read_questions
from llada.evals.reversal.task import measure_reversal
from llada.tokenizer import render_chat

EvaluationOf = Callable[[str, EvaluateConfig], Evaluation]


@pytest.fixture
def poems(tmp_path: Path) -> str:
    pairs = [{"first": f"甲{n}", "second": f"乙{n}"} for n in range(9)]  # more than a block of questions
    (tmp_path / "poems.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(tmp_path / "poems.jsonl")


@pytest.fixture
def model(tmp_path: Path, save_checkpoint: Callable[..., str]) -> str:
    return save_checkpoint(tmp_path / "model", context=160)


def test_answers_are_the_samplers_and_are_counted(
    model: str, poems: str, evaluation_of: EvaluationOf
) -> None:
    network, tokenizer = llada.load(model)
    assert tokenizer is not None

    def answer(prompt: str) -> str:
        ids = render_chat(tokenizer, [{"role": "user", "content": prompt}])
        found = llada.generate(network, torch.tensor([ids]), **asdict(SAMPLING))
        assert tokenizer.eos_token_id not in found.sequences[0, len(ids) :]
        return str(tokenizer.decode(found.sequences[0, len(ids) :], skip_special_tokens=True))

    # A pair whose second line is in what the network writes about its first.
    first = "甲3"
    written = answer(f"{first}的下一句是什么？ 直接输出句子即可。")
    pairs = [json.loads(line) for line in Path(poems).read_text().splitlines()]
    pairs[3]["second"] = written[1:3]
    Path(poems).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    evaluation = evaluation_of(model, EvaluateConfig(("reversal",), poems=PoemsConfig(poems)))
    figures = measure_reversal(evaluation)
    lines = [json.loads(line) for line in Path(evaluation.output, "reversal.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [question.prompt for question in read_questions(poems)]
    assert lines[3]["answer"] == written
    assert lines[17]["answer"] == answer(lines[17]["prompt"])
    right = {
        name: sum(line["is_right"] for line in lines if line["direction"] == name)
        for name in ("forward", "reversal")
    }
    assert right["forward"] >= 1
    for name, count in right.items():
        assert figures[name] == count / 9
        assert figures[f"{name}_stderr"] == pytest.approx((count / 9 * (1 - count / 9) / 8) ** 0.5)
    assert figures["poems"] == 9
    assert lines[0]["nfe"] == 28
    assert sorted(lines[0]["reveal_step"]) == list(range(28))


def test_a_plain_prompt_is_the_question_alone(model: str, poems: str, evaluation_of: EvaluationOf) -> None:
    evaluation = evaluation_of(model, EvaluateConfig(poems=PoemsConfig(poems, limit=1, chat=False)))
    measure_reversal(evaluation)
    line = json.loads(Path(evaluation.output, "reversal.jsonl").read_text().splitlines()[0])
    network, tokenizer = llada.load(model)
    assert tokenizer is not None
    ids = tokenizer.encode(line["prompt"], add_special_tokens=False)
    found = llada.generate(network, [ids], **asdict(SAMPLING))
    assert line["answer"] == tokenizer.decode(found.sequences[0, len(ids) :], skip_special_tokens=True)


def test_an_autoregressive_twin_answers_from_left_to_right(
    poems: str, tmp_path: Path, save_checkpoint: Callable[..., str], evaluation_of: EvaluationOf
) -> None:
    twin = save_checkpoint(tmp_path / "twin", context=160, causal=True)
    evaluation = evaluation_of(twin, EvaluateConfig(poems=PoemsConfig(poems)))
    figures = measure_reversal(evaluation)
    assert figures["poems"] == 9
    line = json.loads(Path(evaluation.output, "reversal.jsonl").read_text().splitlines()[10])
    network, tokenizer = llada.load(twin)
    assert tokenizer is not None
    ids = render_chat(tokenizer, [{"role": "user", "content": line["prompt"]}])
    for _ in range(28):
        logits = network(torch.tensor([ids]))[0, -1].detach()
        logits[[tokenizer.eos_token_id, tokenizer.mask_token_id]] = -torch.inf
        ids.append(int(logits.argmax()))
    assert line["answer"] == tokenizer.decode(ids[-28:], skip_special_tokens=True)
    assert (line["nfe"], line["reveal_step"]) == (28, list(range(28)))


def test_who_cannot_be_asked_is_named(
    poems: str,
    diffusion_model: str,
    causal_model: str,
    evaluation_of: EvaluationOf,
) -> None:
    asked = EvaluateConfig(poems=PoemsConfig(poems))
    for model, config, message in (
        (diffusion_model, EvaluateConfig(), "needs --poems.data"),
        (causal_model, asked, r"exceeds the context length of 64"),
        (diffusion_model, asked, r"exceeds the context length of 64"),
    ):
        with pytest.raises(UserError, match=message):
            measure_reversal(evaluation_of(model, config))


def test_what_is_published_stands_beside_ours_and_one_poem_has_no_error(
    model: str, poems: str, evaluation_of: EvaluationOf
) -> None:
    config = EvaluateConfig(("reversal",), poems=PoemsConfig(poems, limit=1))
    figures = measure_reversal(evaluation_of(model, config))
    assert figures["published/LLaDA-8B-Instruct/forward"] == pytest.approx(0.518)
    assert figures["published/GPT-4o-2024-08-06/reversal"] == pytest.approx(0.343)
    assert set(figures) - {name for name in figures if name.startswith("published/")} == {
        "poems",
        "forward",
        "reversal",
    }
