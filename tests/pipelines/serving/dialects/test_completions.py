"""Completions: prompts in their four forms, and a text completion's objects."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from llada.sampling.events import Finished, Text, Token
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


def test_offsets_are_places_in_the_text() -> None:
    """Of a character of several tokens that of the character, of bytes that are none that of what stands for them."""
    raws = [
        "ü".encode()[:1],
        "ü".encode()[1:],
        b"a",
        b"\xab",
        b"\xe2\x82",
        b"<eos>",
        b"\xac!",
        b"\xf0\x9f",
        b"z",
    ]
    tokens = tuple(Token(i, raw, 0, i, -0.5, is_special=raw == b"<eos>") for i, raw in enumerate(raws))
    text = b"".join(token.raw for token in tokens if not token.is_special).decode(errors="replace")
    assert text == "üa\ufffd€!\ufffdz"
    expected = [0, 0, 1, 2, 3, 3, 3, 5, 5]
    for cuts in ([0, 9], [0, 1, 5, 9]):
        writer = CompletionWriter(body(prompt="x", logprobs=0), "tiny")
        parts = [tokens[begin:end] for begin, end in itertools.pairwise(cuts)]
        assert [at for part in parts for at in writer.logprobs(0, part)["text_offset"]] == expected


def test_the_end_token_has_its_log_probability_and_no_text() -> None:
    token, end = Token(7, b"Go", 0, 0, -0.5), Token(0, b"<|endoftext|>", 0, 1, -0.25, is_special=True)
    events = [Text(0, "Go", (token,)), Finished(0, "stop", 1, 1, 2, end)]
    asked, streamed = (
        CompletionWriter(body(prompt="x", logprobs=0, stream=s), "tiny") for s in (False, True)
    )
    for event in events:
        asked.add(event)
    (choice,) = asked.whole()["choices"]
    assert choice["text"] == "Go"
    assert choice["logprobs"] == {
        "tokens": ["Go", "<|endoftext|>"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": None,
        "text_offset": [0, 2],
    }
    parts = [chunk["choices"][0]["logprobs"] for event in events for chunk in streamed.chunks(event)]
    assert [part["token_logprobs"] for part in parts] == [[-0.5], [-0.25]]
    assert [part["text_offset"] for part in parts] == [[0], [2]]
