"""/v1/responses: input in OpenAI's forms, what is refused by name, and the events of a stream."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pipelines.serving.dialects.parsing import parse_body
from pipelines.serving.dialects.responses import ResponsesBody
from pipelines.serving.errors import RequestError
from pipelines.serving.replica import Denoiser

Call = Callable[..., httpx.Response]
BODY = {"input": "How are you?", "temperature": 1.0, "seed": 3}


def test_a_response_is_the_reply_of_a_chat(post: Call, denoiser: Denoiser) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}]
    fields = {"temperature": 1.0, "seed": 3}
    chat = post("/v1/chat/completions", {**fields, "messages": messages, "max_tokens": 6}).json()
    turn = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "How are you?"}]}
    for given in (
        {"input": "How are you?", "instructions": "Be brief."},
        {"input": [{"role": "developer", "content": "Be brief."}, turn]},
    ):
        response = post("/v1/responses", {**fields, **given, "max_output_tokens": 6}).json()
        (item,) = response["output"]
        assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
        assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
        assert response["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
        assert response["denoising"] == chat["denoising"]
        is_cut = chat["choices"][0]["finish_reason"] == "length"
        assert response["status"] == ("incomplete" if is_cut else "completed")
        assert response["system_fingerprint"] == denoiser.fingerprint


def test_a_stream_is_numbered_events(post: Call) -> None:
    whole = post("/v1/responses", BODY).json()
    text = post("/v1/responses", {**BODY, "stream": True, "stream_options": {"include_drafts": True}}).text
    frames = [frame.split("\n") for frame in text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    kinds = [event["type"] for event in events if event["type"] != "draft"]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[4 + len(deltas) :] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole['status']}",
    ]
    assert "".join(deltas) == whole["output"][0]["content"][0]["text"] == events[-4]["text"]
    assert events[-1]["response"]["usage"] == whole["usage"]
    assert any(event["type"] == "draft" and None in event["draft"]["tokens"] for event in events)


def test_the_reply_may_have_to_fit_a_schema(post: Call) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}
    response = post("/v1/responses", {**BODY, "max_output_tokens": 40, "text": {"format": form}}).json()
    assert json.loads(response["output"][0]["content"][0]["text"])["ok"] in (True, False)
    assert response["status"] == "completed"
    assert response["text"]["format"] == form


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": {"effort": "none", "summary": None}},
        {"reasoning": {"summary": None}},
        {"text": {"format": None, "verbosity": None}},
        {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "input_text",
                            "text": "Go",
                            "prompt_cache_breakpoint": {"mode": "explicit"},
                            "annotations": None,
                        }
                    ],
                }
            ]
        },
    ],
    ids=str,
)
def test_what_asks_for_nothing_changes_nothing(fields: dict[str, Any]) -> None:
    body = parse_body(ResponsesBody, json.dumps({**BODY, "input": "Go", **fields}).encode())
    plain = parse_body(ResponsesBody, json.dumps({**BODY, "input": "Go"}).encode())
    assert body.model_copy(update={"text": None}) == plain


def test_the_form_of_the_reply_is_refused_in_the_clients_words(post: Call) -> None:
    def schema(inner: Any) -> dict[str, Any]:
        form = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": inner}}}
        return {"text": {"format": form}, "max_output_tokens": 3}

    for fields, param, message in [
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "text.format.type: input should be"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "text.format: type json_schema goes"),
        (
            {"text": {"format": {"type": "text", "name": "x"}}},
            "text.format",
            "name goes with type json_schema",
        ),
        ({"response_format": {"type": "text"}}, "response_format", "is called text.format here"),
        (schema({"type": "array"}), "text.format", "text.format: $.a is an array"),
        (schema({"type": "null"}), "max_output_tokens", "and max_output_tokens is 3"),
        (schema({"const": "x" * 90_000}), "text.format", "the schema has 90,002 characters"),
    ]:
        error = post("/v1/responses", {**BODY, **fields}).json()["error"]
        assert (error["param"], message in error["message"]) == (param, True), error


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"previous_response_id": "resp_1"},
            'previous_response_id="resp_1" is not supported: nothing is kept',
        ),
        ({"store": True}, "store=true is not supported"),
        ({"tools": [{"type": "web_search"}]}, "the model calls no tools"),
        ({"reasoning": {"effort": "low"}}, "the model has no reasoning mode"),
        ({"reasoning": {"effort": "none", "summary": "auto"}}, "the model has no reasoning mode"),
        ({"background": True}, "a response is waited for"),
        ({"max_tokens": 5}, "max_tokens is called max_output_tokens here"),
        ({"n": 2}, "a response is one"),
        ({"input": []}, "input: list should have at least 1 item"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "the model reads text only"),
        ({"max_output_token": 5}, "did you mean 'max_output_tokens'?"),
        ({"text": {"format": {"type": "json_object"}}}, "json_object names no fields"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refuses_by_name(post: Call, fields: dict[str, Any], message: str) -> None:
    answer = post("/v1/responses", {**BODY, **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_every_field_of_openais_client_is_known() -> None:
    pytest.importorskip("openai", reason="needs the package openai")
    from openai.types.responses import response_create_params

    names = typing.get_type_hints(response_create_params.ResponseCreateParamsStreaming).keys()
    assert {"input", "instructions", "max_output_tokens", "stream"} <= names
    for name in names:
        with pytest.raises(RequestError) as caught:  # of no field's type
            parse_body(ResponsesBody, json.dumps({name: [[{"none": "such"}]]}).encode())
        assert "unknown field" not in caught.value.message, name
