"""The questions of the reversal task, and when an answer is right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llada.errors import UserError
from llada.evals.reversal.poems import SAMPLING, is_right, read_questions

SHARED = Path(os.environ.get("LLADA_SHARED") or Path(__file__).resolve().parents[5] / "shared")


def test_both_questions_are_spelled_as_published(tmp_path: Path) -> None:
    pairs = [
        {"first": "停车坐爱枫林晚", "second": "霜叶红于二月花", "source": "唐"},
        {"first": "甲", "second": "乙"},
    ]
    (tmp_path / "poem_data.json").write_text(json.dumps(pairs))
    questions = read_questions(str(tmp_path / "poem_data.json"))
    assert [question.direction for question in questions] == ["forward"] * 2 + ["reversal"] * 2
    assert questions[0][:2] == ("停车坐爱枫林晚的下一句是什么？ 直接输出句子即可。", "霜叶红于二月花")
    assert questions[2][:2] == ("霜叶红于二月花的上一句是什么？ 直接输出句子即可。", "停车坐爱枫林晚")
    assert len(read_questions(str(tmp_path / "poem_data.json"), limit=1)) == 2
    knobs = (
        SAMPLING.gen_length,
        SAMPLING.steps,
        SAMPLING.block_length,
        SAMPLING.temperature,
        SAMPLING.logits_eos_inf,
    )
    assert knobs == (28, 28, 28, 0, True)


def test_an_answer_is_right_wherever_the_line_stands_in_it() -> None:
    assert is_right("“霜叶红于二月花。”", "霜叶红于二月花")
    assert not is_right("霜叶红，于二月花", "霜叶红于二月花")
    assert not is_right("", "霜")


def test_a_pair_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"first": "甲", "second": "乙"}\n{"first": "甲", "secnd": "乙"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl, row 2 has no field 'second'; did you mean 'secnd'"):
        read_questions(str(tmp_path / "p.jsonl"))
    (tmp_path / "p.jsonl").write_text('{"first": "甲", "second": " "}\n')
    with pytest.raises(UserError, match=r"p\.jsonl, row 1 has an empty line"):
        read_questions(str(tmp_path / "p.jsonl"))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real text at {SHARED}")
def test_the_published_pairs() -> None:
    questions = read_questions(str(SHARED / "data/eval/poem.jsonl"))
    assert len(questions) == 100
    assert all(question.gold not in question.prompt for question in questions)
