"""Events as OpenAI's objects, whole and in chunks: what both dialects share."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llada.sampling.events import Event, Finished, Text
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


def test_the_canvas_stands_beside_the_text(dialect: Any) -> None:
    *_, chunk = make(dialect, stream=True).chunks(Text(0, "Go", ("Go", 3)))
    assert chunk["choices"][0]["canvas"] == ("Go", 3)


def test_a_frame_is_a_server_sent_event(dialect: Any) -> None:
    frame = make(dialect).frame({"text": "Grüße\n"})
    assert frame.startswith('data: {"text": "Grüße')
    assert frame.endswith("\n\n")
    assert json.loads(frame.removeprefix("data: ")) == {"text": "Grüße\n"}
