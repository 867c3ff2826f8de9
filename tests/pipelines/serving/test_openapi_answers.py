"""What the endpoint answers fits the schema that it shows of it: whole answers, every event of a stream, the headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import pytest

from pipelines.serving.openapi import openapi_schema
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import DIALECTS

Call = Callable[..., httpx.Response]
SCHEMA = openapi_schema(DIALECTS)
CHAT = {"messages": [{"role": "user", "content": "Go"}]}
TOLD = {"seed": 1, "temperature": 1.0, "block_length": 4, "include_trace": True}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Go", "max_tokens": 12, "n": 2, "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": "Go", "suffix": [" on", 3, "!"], "max_tokens": 3}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}),
    ("/v1/responses", {"input": "Go", "max_output_tokens": 12}),
]


def check(schema: dict[str, Any], value: Any) -> None:
    jsonschema.Draft202012Validator({**schema, "components": SCHEMA["components"]}).validate(value)


def answer_of(path: str) -> dict[str, Any]:
    found: dict[str, Any] = SCHEMA["paths"][path]["post"]["responses"]["200"]
    return found


@pytest.mark.parametrize("path, body", ASKED, ids=str)
def test_answers_and_events_are_as_it_says(post: Call, path: str, body: dict[str, Any]) -> None:
    content = answer_of(path)["content"]
    whole = post(path, {**TOLD, **body})
    check(content["application/json"]["schema"], whole.json())
    assert set(answer_of(path)["headers"]) <= whole.headers.keys()
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_drafts": True}}
    if path != "/v1/responses":
        options["stream_options"]["include_usage"] = True
    lines = post(path, {**TOLD, **body, **options}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for event in events:
        check(content["text/event-stream"]["x-item-schema"], event)
    assert any("draft" in event for event in events)
    for name in ("id", "choices") if path != "/v1/responses" else ("type", "sequence_number"):
        with pytest.raises(jsonschema.ValidationError):
            damaged = {key: value for key, value in events[-1].items() if key != name}
            check(content["text/event-stream"]["x-item-schema"], damaged)


def test_refusals_and_cards_are_as_it_says(post: Call, call: Call, denoiser: Denoiser) -> None:
    refused = post("/v1/completions", {"prompt": "Go", "max_tokens": 10**30})
    told = SCHEMA["paths"]["/v1/completions"]["post"]["responses"]["4XX"]
    check(told["content"]["application/json"]["schema"], refused.json())
    assert {"x-request-id", "llada-version"} <= refused.headers.keys() & told["headers"].keys()
    listed = SCHEMA["paths"]["/v1/models"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    check(listed, call(denoiser, "GET", "/v1/models").json())


def test_a_schema_with_numbers_of_any_size_is_echoed(post: Call) -> None:
    bounds = {"type": "integer", "minimum": 10**30, "maximum": 10**30 + 3}
    schema = {"type": "object", "properties": {"x": bounds}, "required": ["x"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "big", "schema": schema}
    answer = post("/v1/responses", {"input": "Go", "text": {"format": form}, "max_output_tokens": 90})
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"]["format"]["schema"] == schema
    assert 0 <= json.loads(answer.json()["output"][0]["content"][0]["text"])["x"] - 10**30 <= 3
