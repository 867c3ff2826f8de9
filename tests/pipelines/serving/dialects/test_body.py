"""The shared body: knobs as the sampler declares them, and what is refused."""

from __future__ import annotations

import json
import pickle
import typing
from typing import Any

import pytest

from llada.sampling.config import request_knobs
from pipelines.serving.answer import Dialect
from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.dialects.chat import ChatBody
from pipelines.serving.dialects.completions import CompletionBody, CompletionWriter
from pipelines.serving.dialects.parsing import parse_body
from pipelines.serving.errors import RequestError
from pipelines.serving.openapi import openapi_schema


def parse(**fields: Any) -> CompletionBody:
    return parse_body(CompletionBody, json.dumps({"prompt": "Go", **fields}).encode())


def problem(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    return caught.value


# What clients rely on: the smallest and the largest value of each knob; None: there is none.
RANGES = {
    "steps": (1, 4096),
    "initial_length": (1, 10**6),
    "expansion_length": (2, 10**6),
    "eos_window": (1, 10**6),
    "eos_threshold": (0, 1),
    "insert_below": (0, 1),
    "insert_eos_threshold": (0, 1),
    "block_length": (1, None),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, 10**6),
    "min_p": (0, 1),
    "cfg_scale": (0, None),
    "threshold": (0, 1),
    "factor": (0, None),
    "entropy_bound": (0, None),
    "error_bound": (0, 10**6),
    "leap_threshold": (0, 1),
    "leap_anchor": (0, 1),
    "leap_radius": (0, 10**6),
    "remdm_cap": (0, 1),
    "p2_eta": (0, 10**6),
    "refresh_every": (1, None),
    "vicinity": (0, None),
    "prompt_interval": (1, 10**6),
    "response_interval": (1, 10**6),
    "refresh_share": (0, 1),
    "shared_depth": (0, 1),
    "shared_prefix": (1, None),
    "suffix_window": (0, None),
}
NAMES = {"remasking", "cache", "schedule"}
SWITCHES = {"stratified", "logits_eos_inf", "confidence_eos_eot_inf"}
POSITIONS = {"fixed", "allowed", "forbidden"}


def test_every_knob_that_a_request_may_set_is_a_field() -> None:
    names = [knob.name for knob in request_knobs()]
    assert set(names) == {*RANGES, *NAMES, *SWITCHES, *POSITIONS}
    for name in names:
        assert SamplingBody.model_fields[name].description
        assert SamplingBody.model_fields[name].default is None
    assert "gen_length" not in SamplingBody.model_fields
    assert "schedule" in SamplingBody.model_fields


@pytest.mark.parametrize("name", RANGES)
def test_the_range_of_a_knob(name: str) -> None:
    low, high = RANGES[name]
    assert parse(**{name: low}).knobs() == {name: low}
    assert f"{name}: input should be greater than or equal to {low}" in problem(**{name: low - 1}).message
    if high is None:
        assert parse(**{name: 10**6}).knobs() == {name: 10**6}
    else:
        assert parse(**{name: high}).knobs() == {name: high}
        assert f"{name}: input should be less than or equal to {high}" in problem(**{name: high + 1}).message
    assert problem(**{name: "1"}).param == name  # no number in quotes, no true for 1
    assert problem(**{name: True}).param == name


def test_only_what_is_said_is_asked_for() -> None:
    assert parse().knobs() == {}
    assert parse(steps=None, temperature=None).knobs() == {}
    assert parse(temperature=0, remasking="anything").knobs() == {"temperature": 0, "remasking": "anything"}


def test_refused_fields_name_their_reason() -> None:
    error = problem(presence_penalty=0.9)
    assert (error.status, error.param, error.code) == (400, "presence_penalty", "unsupported_parameter")
    assert error.message == "presence_penalty=0.9 is not supported: the sampler unmasks tokens out of order"
    assert parse(presence_penalty=0.0, logprobs=False, tools=[], store=None).knobs() == {}
    assert "not supported" in problem(store=0).message  # 0 is not false


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", [*RANGES, "max_tokens", "n", "seed", "presence_penalty"])
def test_only_finite_numbers(name: str, number: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_body(CompletionBody, f'{{"prompt": "x", "{name}": {number}}}'.encode())
    assert (caught.value.status, caught.value.param) == (400, name)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_only_finite_numbers_in_a_schema(number: str) -> None:
    """A reply would hold them, and be no JSON."""
    schema = f'{{"type": "object", "properties": {{"a": {{"const": {number}}}}}}}'
    form = f'{{"type": "json_schema", "json_schema": {{"name": "n", "schema": {schema}}}}}'
    with pytest.raises(RequestError) as caught:
        parse_body(CompletionBody, f'{{"prompt": "x", "response_format": {form}}}'.encode())
    assert caught.value.status == 400
    assert "a number that is none in JSON" in caught.value.message


@pytest.mark.parametrize("depth", [250, 300, 900, 100_000])
def test_what_is_accepted_reaches_a_replica_and_what_is_nested_deeper_is_refused(depth: int) -> None:
    """Ray pickles it on its way."""
    nested = '{"a":' * depth + "1" + "}" * depth
    raw = f'{{"prompt": "x", "prompt_cache_options": {nested}}}'.encode()
    if depth < 256:
        body = parse_body(CompletionBody, raw)
        assert pickle.loads(pickle.dumps(body)) == body
        return
    with pytest.raises(RequestError) as caught:
        parse_body(CompletionBody, raw)
    assert caught.value.status == 400


def test_labels_are_accepted_and_change_nothing() -> None:
    labels = {
        "user": "someone",
        "safety_identifier": "5f",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "explicit"},
    }
    assert parse(**labels).knobs() == {}
    for name in labels:
        assert problem(**{name: 5}).param == name


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_every_field_of_openais_client_is_known(kind: str) -> None:
    """Honoured, refused with the reason, or a label; never an unknown name."""
    pytest.importorskip("openai", reason="needs the package openai")
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    module = chat_create_params if kind == "chat" else completion_create_params
    body, required = (ChatBody, "messages") if kind == "chat" else (CompletionBody, "prompt")
    names = typing.get_type_hints(module.CompletionCreateParamsStreaming).keys()
    assert {"model", "stop", "seed", "stream_options", required} <= names
    for name in names:
        with pytest.raises(RequestError) as caught:  # of no field's type
            parse_body(body, json.dumps({name: [[{"none": "such"}]]}).encode())
        assert "unknown field" not in caught.value.message, name


def test_a_body_travels_to_the_replica() -> None:
    sent = parse(steps=3, stop="x", stream=True, stream_options={"include_drafts": True})
    assert pickle.loads(pickle.dumps(sent)) == sent


def test_fixed_tokens_are_positions_and_ids_or_words() -> None:
    assert parse(fixed={"0": " word", "12": 7}).knobs() == {"fixed": {0: " word", 12: 7}}
    for bad in ({"x": 1}, {"0": 1.5}, {"0": True}, {"0": [1]}, [1], "0:word", {"*": 1}):
        assert problem(fixed=bad).param.startswith("fixed")
    assert parse(logits_eos_inf=True).knobs() == {"logits_eos_inf": True}
    assert problem(logits_eos_inf=1).param == "logits_eos_inf"


@pytest.mark.parametrize("key", ["00", " 0", "0 ", "+1", "-0", "1_0", "1.0", "٣", "", "1" * 5000])
def test_a_position_has_one_spelling(key: str) -> None:
    """Of two the client would lose one in silence."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema")
    schema = openapi_schema([Dialect("/", CompletionBody, CompletionWriter)])
    rules = jsonschema.Draft202012Validator(
        schema["components"]["schemas"]["CompletionBody"] | {"components": schema["components"]}
    )
    for name, tokens in (("fixed", 7), ("allowed", [7]), ("forbidden", [7])):
        error = problem(**{name: {"0": tokens, key: tokens}})
        assert (error.status, error.message.split(": ")[1][:28]) == (400, "input should be a position a")
        assert not rules.is_valid({"prompt": "Go", name: {key: tokens}})
        assert rules.is_valid({"prompt": "Go", name: {"0": tokens, "10": tokens}})
    assert rules.is_valid({"prompt": "Go", "allowed": {"*": [7]}})
    assert not rules.is_valid({"prompt": "Go", "fixed": {"*": 7}})


def test_allowed_and_forbidden_tokens_are_lists_by_position() -> None:
    for name in ("allowed", "forbidden"):
        assert parse(**{name: {"0": [1, " a"], "*": [3]}}).knobs() == {name: {0: [1, " a"], "*": [3]}}
        for bad, where in (
            ({"x": [1]}, ".x"),
            ({"1.5": [1]}, ".1.5"),
            ({"0": 1}, ".0"),
            ({"0": [True]}, ".0.0"),
            ({"0": [1.5]}, ".0.0"),
            ([1], ""),
        ):
            error = problem(**{name: bad})
            assert (error.status, error.param) == (400, f"{name}{where}")
