"""Events as OpenAI's objects, whole and in chunks: what both dialects share."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from llada.sampling.events import Draft, Event, Finished, Text, Token
from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.dialects.chat import ChatBody, ChatWriter
from pipelines.serving.dialects.completions import CompletionBody, CompletionWriter
from pipelines.serving.dialects.writer import ReplyWriter

EVENTS: list[Event] = [
    Text(0, "Go"),
    Text(1, "Well"),
    Text(0, " on"),
    Finished(1, "stop", prompt_tokens=0, completion_tokens=2, nfe=4),
    Finished(0, "length", prompt_tokens=5, completion_tokens=6, nfe=6),
]
DIALECTS: list[tuple[type[ReplyWriter], type[SamplingBody], dict[str, Any]]] = [
    (CompletionWriter, CompletionBody, {"prompt": "x"}),
    (ChatWriter, ChatBody, {"messages": [{"role": "user", "content": "x"}]}),
]


@pytest.fixture(params=DIALECTS, ids=["completions", "chat"])
def dialect(request: pytest.FixtureRequest) -> Any:
    return request.param


def make(dialect: Any, **fields: Any) -> ReplyWriter:
    writer, body, required = dialect
    return writer(body.model_validate({**required, **fields}), "tiny")


def test_a_whole_reply(dialect: Any) -> None:
    writer = make(dialect)
    for event in EVENTS:
        writer.add(event)
    whole = writer.whole()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["length", "stop"]
    assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
    assert whole["denoising"] == {"forwards": 10, "tokens_per_forward": 0.8}
    head = ["id", "object", "created", "model", "system_fingerprint"]
    assert list(whole) == [*head, "choices", "usage", "denoising"]


def test_no_forward_is_no_division_by_zero(dialect: Any) -> None:
    writer = make(dialect)
    writer.add(Finished(0, "stop", prompt_tokens=1, completion_tokens=0, nfe=0))
    assert writer.whole()["denoising"] == {"forwards": 0, "tokens_per_forward": 0.0}


def test_usage_comes_last_for_those_who_ask(dialect: Any) -> None:
    silent = make(dialect, stream=True)
    chunks = [chunk for event in EVENTS for chunk in silent.chunks(event)]
    assert silent.closing_chunks() == []
    assert all("usage" not in chunk for chunk in chunks)
    asked = make(dialect, stream=True, stream_options={"include_usage": True})
    chunks = [chunk for event in EVENTS for chunk in asked.chunks(event)]
    assert all(chunk["usage"] is None for chunk in chunks)
    (last,) = asked.closing_chunks()
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 13
    assert last["id"] == chunks[0]["id"]


def test_a_draft_is_an_event_of_its_own_without_text(dialect: Any) -> None:
    writer = make(dialect, stream=True)
    *_, chunk = writer.chunks(Draft(0, 4, (0, 2), ("Go", None), (3, None), (0.25, None)))
    assert chunk["draft"] == {
        "forwards": 4,
        "block": (0, 2),
        "tokens": ("Go", None),
        "steps": (3, None),
        "confidences": [0.25, None],
    }
    (choice,) = chunk["choices"]
    assert not choice.get("text")
    assert not choice.get("delta")
    assert choice["finish_reason"] is None
    assert writer.frame(chunk).startswith('event: draft\ndata: {"id"')


def test_a_trace_is_for_those_who_ask(dialect: Any) -> None:
    tokens = (Token(7, b"Gr\xc3", 0, 1, math.log(0.5)), Token(8, b"\xbc", 1, None, None))
    events = [Text(0, "", tokens[:1]), Text(0, "Grü", tokens[1:]), Finished(0, "length", 1, 2, 2)]
    asked, silent = make(dialect, include_trace=True), make(dialect)
    for event in events:
        asked.add(event)
        silent.add(event)
    (choice,) = asked.whole()["choices"]
    assert choice["trace"] == {
        "tokens": ["Gr\\xc3", "\\xbc"],
        "token_ids": [7, 8],
        "blocks": [0, 1],
        "steps": [1, None],
        "confidences": [0.5, None],
    }
    assert "trace" not in silent.whole()["choices"][0]
    streamed = make(dialect, stream=True, include_trace=True)
    *texts, end = [chunk["choices"][0] for event in events for chunk in streamed.chunks(event)]
    assert end["trace"] == choice["trace"]
    assert all("trace" not in text for text in texts)


def test_a_frame_is_a_server_sent_event(dialect: Any) -> None:
    frame = make(dialect).frame({"text": "Grüße\n"})
    assert frame.startswith('data: {"text":"Grüße')
    assert frame.endswith("\n\n")
    assert json.loads(frame.removeprefix("data: ")) == {"text": "Grüße\n"}
