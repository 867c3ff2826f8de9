"""Completions: prompts in their four forms, and a text completion's objects."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llada.sampling.events import Finished, Text
from llada.tokenizer import train_tokenizer
from pipelines.serving.dialects.body import Prompt
from pipelines.serving.dialects.completions import CompletionBody, CompletionWriter
from pipelines.serving.prompts import PromptEncoder


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    tokenizer = train_tokenizer(["One, two, three."] * 5, 270)
    return PromptEncoder(tokenizer, vocab_size=len(tokenizer), mask_id=tokenizer.mask_token_id, max_length=64)


def body(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate(fields)


def test_a_prompt_is_text_or_token_ids_one_or_several(encoder: PromptEncoder) -> None:
    one, two = encoder.encode_text("One"), encoder.encode_text("two")
    assert body(prompt="One").prompts(encoder) == [Prompt(one, [])]
    assert body(prompt=one).prompts(encoder) == [Prompt(one, [])]
    assert body(prompt=["One", "two"]).prompts(encoder) == [Prompt(one, []), Prompt(two, [])]
    assert body(prompt=["One", two]).prompts(encoder) == [Prompt(one, []), Prompt(two, [])]
    assert body(prompt="").prompts(encoder) == [Prompt([], [])]
    for wrong in (5, [], ["One", 5], [True], {"text": "One"}):
        with pytest.raises(ValidationError):
            body(prompt=wrong)


def test_suffix_and_echo(encoder: PromptEncoder) -> None:
    one = encoder.encode_text("One")
    asked = body(prompt=["One", one], suffix=" three", echo=True)
    suffix = encoder.encode_text(" three")
    assert asked.prompts(encoder) == [Prompt(one, suffix, echo="One")] * 2


def test_chunks_are_text_completions() -> None:
    writer = CompletionWriter(body(prompt="x", stream=True), "tiny")
    text, end = writer.chunks(Text(0, "Go")), writer.chunks(Finished(0, "length", 1, 1, 1))
    assert len(text) == len(end) == 1
    assert text[0]["object"] == end[0]["object"] == writer.whole()["object"] == "text_completion"
    assert text[0]["id"].startswith("cmpl-")
    assert text[0]["choices"] == [{"index": 0, "text": "Go", "logprobs": None, "finish_reason": None}]
    assert end[0]["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]
    assert writer.whole()["choices"][0]["text"] == "Go"
