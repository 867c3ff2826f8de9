"""Bodies that nobody should send: good ones with something wrong in them, wherever it may be, and text that is no JSON.

Whatever comes, there is an answer of the 200s or 400s in OpenAI's form, soon, and nothing runs on behind it. (What the schema allows
is asked for in test_openapi.py.)
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import time
from collections import Counter
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.serving.openapi import openapi_schema
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import DIALECTS

SCHEMA = openapi_schema(DIALECTS)
PATIENCE_S = 120.0  # a reply on this network takes a hundredth of that, also where other things run
JSON_SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": ["x", "yy"]},
        "b": {"type": "object", "properties": {"c": {"type": "integer"}}},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
# One good request or several of each kind of thing that one may ask for.
GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "Go on!", "max_tokens": 6, "temperature": 1.0, "seed": 3, "stop": ["x"], "n": 2},
        {"prompt": [[7, 8], "Go"], "max_tokens": 4, "logprobs": 2, "echo": True, "stop_token_ids": [9]},
        {"prompt": "One", "suffix": [" two", 3, " go"], "max_tokens": 2, "stream": True},
        {"prompt": "One", "echo": True, "logprobs": 0, "max_tokens": 0, "likelihood_samples": 3},
        {"prompt": "One", "max_tokens": 6, "fixed": {"1": 8}, "allowed": {"*": [7, 8, 9]}, "cache": "dual"},
        {"prompt": "One", "max_tokens": 6, "fixed": {"1": 10**30}, "forbidden": {"0": [2**63, 2**31]}},
        {
            "prompt": "",
            "max_tokens": 8,
            "steps": 4,
            "block_length": 4,
            "remasking": "random",
            "cfg_scale": 1.0,
        },
        {"prompt": "Go", "max_tokens": 8, "initial_length": 2, "insert_below": 0.5, "include_trace": True},
    ],
    "/v1/chat/completions": [
        {
            "messages": [{"role": "user", "content": "Go"}],
            "max_tokens": 4,
            "logprobs": True,
            "top_logprobs": 3,
        },
        {
            "messages": [
                {"role": "system", "content": "One"},
                {"role": "user", "content": [{"type": "text", "text": "two"}]},
            ],
            "max_completion_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True, "include_drafts": True},
        },
        {
            "messages": [{"role": "user", "content": "Go"}],
            "max_tokens": 24,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": JSON_SCHEMA}},
        },
    ],
    "/v1/responses": [
        {"input": "Go", "max_output_tokens": 4, "instructions": "One"},
        {"input": [{"role": "user", "content": "Go"}], "max_output_tokens": 4, "stream": True},
    ],
    "/tokenize": [{"prompt": "Go on!"}, {"messages": [{"role": "user", "content": "Go"}]}],
    "/detokenize": [{"tokens": [7, 8, 9]}],
}
NAMES = sorted(
    {name for schema in SCHEMA["components"]["schemas"].values() for name in schema.get("properties", {})}
)
NUMBERS = [0, -1, 1, 2, 0.5, 63, 64, 65, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**40]
NUMBERS += [1e-320, 1e308, -0.0, 1.5, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    " ",
    "\x00",
    "\ud800",
    "<|mdm_mask|>",
    "<|eot_id|>",
    "🙂" * 40,
    "a" * 5000,
    "__proto__",
    "*",
    "1",
    "random",
]
leaf = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.integers(-5, 80)
    | st.floats(-2, 2)
    | st.sampled_from(TEXTS)
    | st.text(max_size=12)
)
value = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(NAMES) | st.sampled_from(TEXTS), inner, max_size=4)
    ),
    max_leaves=8,
)


def _places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in it."""
    items = list(
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    )
    return [(node, key) for key, _ in items] + [place for _, inner in items for place in _places(inner)]


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """What is sent to `path`."""
    body = copy.deepcopy(draw(st.sampled_from(GOOD[path])))
    for _ in range(draw(st.integers(0, 2))):
        places = _places(body)
        kind = draw(st.sampled_from(["replace", "replace", "add", "remove", "nest", "repeat"]))
        if kind == "add" or not places:
            body[draw(st.sampled_from(NAMES))] = draw(value)
            continue
        container, key = draw(st.sampled_from(places))
        if kind == "replace":
            container[key] = draw(value)
        elif kind == "remove":
            del container[key]
        elif kind == "nest":
            for _ in range(draw(st.sampled_from([1, 2, 900]))):
                container[key] = [container[key]]
        else:
            container[key] = [container[key]] * draw(st.sampled_from([2, 5, 300]))
    # As it is written by Python: with NaN, Infinity and halves of surrogate pairs.
    raw = json.dumps(body).encode()
    damage = draw(st.sampled_from([None] * 8 + ["cut", "byte", "twice", "utf-16", "more"]))
    place = draw(st.integers(0, len(raw) - 1))
    if damage == "cut":
        return raw[:place]
    if damage == "byte":
        return raw[:place] + draw(st.binary(min_size=1, max_size=2)) + raw[place + 1 :]
    if damage == "twice":
        return raw[:-1] + b"," + raw[1:]
    if damage == "utf-16":
        return raw.decode().encode("utf-16")
    return raw + b" {}" if damage == "more" else raw


def attack(api: FastAPI, examples: int) -> dict[str, Counter[int]]:
    """{path: how often it answered with which status} to so many bodies each."""
    statuses: dict[str, Counter[int]] = {path: Counter() for path in GOOD}

    async def send(path: str, raw: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            head = {"content-type": "application/json"}
            return await asyncio.wait_for(client.post(path, content=raw, headers=head), PATIENCE_S)

    for path in GOOD:

        @given(path=st.just(path), raw=bodies(path))
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def ask(path: str, raw: bytes) -> None:
            answer = asyncio.run(send(path, raw))
            statuses[path][answer.status_code] += 1
            assert answer.status_code < 500, answer.text
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error.keys() == {"message", "type", "param", "code"}
                assert 0 < len(error["message"]) <= 1000
            elif answer.headers["content-type"].startswith("application/json"):
                answer.json()
            else:
                events = answer.text.split("\n\n")
                assert events[-1] == ""
                assert '"server_error"' not in answer.text

        ask()
    return statuses


def check(statuses: dict[str, Counter[int]], denoiser: Denoiser) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while denoiser.engine.num_unfinished or denoiser.engine.num_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    denoiser.check_health()
    # Both kinds have been looked at: what is refused, and what is denoised all the same.
    assert all(found[200] and found[400] for found in statuses.values()), statuses
    assert set().union(*statuses.values()) <= {200, 400, 404}


def test_whatever_comes_gets_an_answer(short_api: FastAPI, short_denoiser: Denoiser) -> None:
    check(attack(short_api, 25), short_denoiser)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_at_length(short_api: FastAPI, short_denoiser: Denoiser) -> None:
    check(attack(short_api, int(os.environ.get("FUZZ_EXAMPLES", "3000"))), short_denoiser)
