"""Chat completions: messages as clients send them, and a chat completion's objects."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llada.sampling.events import Finished, Text, Token
from llada.tokenizer import train_tokenizer
from pipelines.serving.dialects.chat import ChatBody, ChatWriter
from pipelines.serving.dialects.parsing import parse_body
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


@pytest.mark.parametrize(
    "turn, role, content",
    [
        ({"role": "user", "content": "Hi", "name": "Ann"}, "user", "Hi"),
        ({"role": "user", "content": "Hi", "type": "message"}, "user", "Hi"),
        ({"role": "user", "content": "Hi", "type": "text"}, "user", "Hi"),
        ({"role": "tool", "content": "4", "tool_call_id": "call_1"}, "tool", "4"),
        ({"role": "function", "content": "4", "name": "add"}, "function", "4"),
        ({"role": "assistant", "content": None}, "assistant", ""),
        ({"role": "assistant"}, "assistant", ""),
        ({"role": "assistant", "content": None, "refusal": "No."}, "assistant", "No."),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "assistant", "No."),
        (
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Hi", "prompt_cache_breakpoint": {}, "annotations": None}
                ],
            },
            "user",
            "Hi",
        ),
    ],
    ids=str,
)
def test_fields_of_a_turn_that_clients_send(turn: dict[str, Any], role: str, content: str) -> None:
    (message,) = body([turn]).messages
    assert (message.role, message.content) == (role, content)


@pytest.mark.parametrize(
    "turn, message",
    [
        ({"role": "user", "content": None}, "messages.0.content: field required"),
        ({"role": "tool", "content": "4"}, "messages.0.role: a turn of 'tool' needs the tool_call_id"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "tool_calls is not supported"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "function_call is not supported"),
        ({"role": "assistant", "audio": {"id": "1"}}, "audio is not supported"),
        ({"role": "assistant", "content": "Yes.", "refusal": "No."}, "content and refusal differ"),
        ({"role": "user", "content": "Hi", "refusal": "No."}, "unknown field 'messages.0.refusal'"),
        ({"role": "user", "content": "Hi", "weight": 0}, "unknown field 'messages.0.weight'"),
        ({"role": "user", "content": "Hi", "type": "image"}, "messages.0.type"),
        ({"role": "user", "content": [{"type": "text", "text": "Hi", "bold": True}]}, "unknown field 'bold'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "the model reads text only"),
    ],
    ids=str,
)
def test_what_a_turn_cannot_hold_is_refused_by_name(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        body([turn])
    assert message in caught.value.message


def test_a_conversation_is_one_prompt() -> None:
    tokenizer = train_tokenizer(["One, two, three."] * 5, 270)
    encoder = PromptEncoder(
        tokenizer, vocab_size=len(tokenizer), mask_id=tokenizer.mask_token_id, max_length=64
    )
    (prompt,) = body().prompts(encoder)
    assert prompt.ids == encoder.encode_chat([USER])
    assert (prompt.suffix, prompt.echo) == ((), None)


def test_max_completion_tokens_is_the_newer_name() -> None:
    for given in (body(max_completion_tokens=5), body(max_completion_tokens=5, max_tokens=5)):
        assert (given.limit_field, given.token_limit) == ("max_completion_tokens", 5)
    older = body(max_completion_tokens=None, max_tokens=5)
    assert (older.limit_field, older.token_limit) == ("max_tokens", 5)
    assert body().token_limit is None
    with pytest.raises(RequestError, match="differ") as caught:
        body(max_completion_tokens=5, max_tokens=6)
    assert caught.value.param == "max_completion_tokens"
    with pytest.raises(RequestError, match="did you mean 'max_completion_tokens'"):
        body(max_completion_token=5)
    for wrong in ("5", 5.0, True, 0):
        with pytest.raises(RequestError, match="max_completion_tokens: input should be") as caught:
            body(max_completion_tokens=wrong, max_tokens=5)
        assert caught.value.param == "max_completion_tokens"


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


def test_log_probabilities_have_openais_form() -> None:
    """Whole, and in the chunk of the text that brings the tokens; a part of a character has no text of its own."""
    tokens = (Token(7, b"Gr\xc3", 0, 1, -0.5, ((b"Go", -0.25),)), Token(8, b"\xbc", 0, None, None))
    events = [Text(0, "", tokens[:1]), Text(0, "Grü", tokens[1:]), Finished(0, "length", 1, 2, 2)]
    expected = [
        {
            "token": "Gr\\xc3",
            "logprob": -0.5,
            "bytes": [71, 114, 0xC3],
            "top_logprobs": [{"token": "Go", "logprob": -0.25, "bytes": [71, 111]}],
        },
        {"token": "\\xbc", "logprob": 0.0, "bytes": [0xBC], "top_logprobs": []},
    ]
    whole = ChatWriter(body(logprobs=True, top_logprobs=1), "tiny")
    streamed = ChatWriter(body(logprobs=True, top_logprobs=1, stream=True), "tiny")
    silent = ChatWriter(body(include_trace=True), "tiny")
    for event in events:
        whole.add(event)
        silent.add(event)
    assert whole.whole()["choices"][0]["logprobs"] == {"content": expected, "refusal": None}
    assert silent.whole()["choices"][0]["logprobs"] is None
    chunks = [chunk["choices"][0] for event in events for chunk in streamed.chunks(event)]
    parts = [chunk["logprobs"]["content"] for chunk in chunks if chunk["logprobs"]]
    assert parts == [expected[:1], expected[1:]]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "Grü"
