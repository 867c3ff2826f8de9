"""Chat completions: messages as clients send them, and a chat completion's objects."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llada.sampling.events import Finished, Text
from llada.tokenizer import train_tokenizer
from pipelines.serving.dialects.body import parse_body
from pipelines.serving.dialects.chat import ChatBody, ChatWriter
from pipelines.serving.errors import RequestError
from pipelines.serving.prompts import PromptEncoder

USER = {"role": "user", "content": "And you?"}


def body(messages: list[dict[str, Any]] | None = None, **fields: Any) -> ChatBody:
    return parse_body(ChatBody, json.dumps({"messages": messages or [USER], **fields}).encode())


def test_messages_come_in_the_forms_of_clients() -> None:
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "you?"}]
    history = {"role": "assistant", "content": "Well.", "refusal": None, "tool_calls": []}
    sent = body([{"role": "developer", "content": "Be brief."}, history, {"role": "user", "content": parts}])
    assert [(turn.role, turn.content) for turn in sent.messages] == [
        ("system", "Be brief."),
        ("assistant", "Well."),
        ("user", "And you?"),
    ]


def test_a_conversation_is_one_prompt() -> None:
    tokenizer = train_tokenizer(["One, two, three."] * 5, 270)
    encoder = PromptEncoder(
        tokenizer, vocab_size=len(tokenizer), mask_id=tokenizer.mask_token_id, max_length=64
    )
    (prompt,) = body().prompts(encoder)
    assert prompt.ids == encoder.encode_chat([USER])
    assert (prompt.suffix, prompt.echo) == ((), "")


def test_max_completion_tokens_is_the_newer_name() -> None:
    assert body(max_completion_tokens=5).max_tokens == 5
    assert body(max_completion_tokens=None, max_tokens=5).max_tokens == 5
    assert body(max_completion_tokens=5, max_tokens=5).max_tokens == 5
    with pytest.raises(RequestError, match="differ") as caught:
        body(max_completion_tokens=5, max_tokens=6)
    assert caught.value.param == "max_completion_tokens"
    with pytest.raises(RequestError, match="did you mean 'max_completion_tokens'"):
        body(max_completion_token=5)


def test_chunks_begin_with_the_role_and_end_empty() -> None:
    writer = ChatWriter(body(stream=True), "tiny")
    chunks = [*writer.chunks(Text(0, "Go")), *writer.chunks(Text(0, " on"))]
    chunks += writer.chunks(Finished(0, "stop", 1, 2, 2))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Go"}, {"content": " on"}, {}]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["id"].startswith("chatcmpl-")
    whole = writer.whole()
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "Go on"}


def test_an_empty_reply_still_has_its_role() -> None:
    writer = ChatWriter(body(stream=True), "tiny")
    chunks = writer.chunks(Finished(0, "stop", 1, 0, 1))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {}]
