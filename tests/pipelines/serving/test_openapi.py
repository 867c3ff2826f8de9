"""The schema says what is accepted and answered: requests made up from it get what it promises, and never a 5xx."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings

from llada.sampling.config import request_knobs
from pipelines.serving.dialects.body import _REFUSED
from pipelines.serving.openapi import openapi_schema
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import DIALECTS

Call = Callable[..., httpx.Response]
SCHEMA = openapi_schema(DIALECTS)
BODIES = {dialect.path: SCHEMA["components"]["schemas"][dialect.body.__name__] for dialect in DIALECTS}


def fuzz(api: FastAPI, examples: int) -> dict[str, set[int]]:
    """{path: the statuses that it answered with} to so many requests each; fails at the first that the schema does not promise."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs the package schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as openapi

    wanted = [
        not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_schema_conformance,
    ]
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=examples if operation.method == "post" else 2,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            response = case.call()
            case.validate_response(response, checks=wanted)
            statuses.setdefault(case.path, set()).add(response.status_code)

        ask()
    return statuses


def check_statuses(statuses: dict[str, set[int]]) -> None:
    assert statuses.keys() == SCHEMA["paths"].keys() - {"/openapi.json"}
    assert 200 in statuses["/tokenize"] & statuses["/v1/models"]
    assert max(set().union(*statuses.values())) < 500


def test_what_the_schema_allows_gets_what_it_promises(short_api: FastAPI) -> None:
    check_statuses(fuzz(short_api, 15))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_at_length(short_api: FastAPI) -> None:
    check_statuses(fuzz(short_api, int(os.environ.get("FUZZ_EXAMPLES", "400"))))


def test_every_field_and_every_refusal_is_in_the_schema() -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        properties = BODIES[path]["properties"]
        assert {knob.name for knob in request_knobs()} <= properties.keys()
        assert all(properties[knob.name]["description"] for knob in request_knobs())
        for name, (neutral, reason) in _REFUSED.items():
            assert properties[name]["enum"] == [*neutral, None]
            assert reason in properties[name]["description"]
        assert BODIES[path]["additionalProperties"] is False


def test_the_schema_and_its_page_are_served(call: Call, denoiser: Denoiser) -> None:
    served = call(denoiser, "GET", "/openapi.json").json()
    assert served == json.loads(json.dumps(SCHEMA))
    page = call(denoiser, "GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "openapi.json" in page.text
    for path in ("docs.js", "docs.css"):
        assert f"static/{path}" in page.text
        file = call(denoiser, "GET", f"/static/{path}")
        assert file.status_code == 200
        assert "http://" not in page.text + file.text  # self-contained
        assert "https://" not in page.text + file.text


NULLS = {
    "n": None,
    "stop": None,
    "stream": None,
    "tools": None,
    "logprobs": None,
    "seed": None,
    "top_k": None,
}


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/completions", {"prompt": [[7], "Go"], "stop": "x", **NULLS}),
        ("/v1/completions", {"prompt": [7, 8], "stop": ["x"], "fixed": {"0": 7}, "allowed": {"*": [7, 8]}}),
        ("/v1/chat/completions", {"messages": [{"role": "developer", "content": "Go"}], **NULLS}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Go"}], "name": None}]},
        ),
        ("/tokenize", {"prompt": "Go", "messages": None}),
    ],
    ids=str,
)
def test_the_schema_allows_what_is_accepted(post: Call, path: str, body: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema")
    schema = {**BODIES[path], "components": SCHEMA["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)
    assert post(path, body).status_code == 200
