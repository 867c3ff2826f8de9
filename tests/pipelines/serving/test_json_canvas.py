"""Replies in a schema's frame: valid whatever the network writes, or refused with the place that cannot be done."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pipelines.serving.errors import RequestError
from pipelines.serving.json_canvas import JsonCanvas
from pipelines.serving.replica import Denoiser

jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema")
Call = Callable[..., httpx.Response]


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


PERSON = an_object(
    name={"type": "string", "minLength": 2, "maxLength": 12},
    age={"type": "integer", "minimum": 0, "maximum": 120},
    born={"type": "integer"},
    height={"type": "number", "minimum": 0},
    balance={"type": "number"},
    married={"type": "boolean"},
    colour={"enum": ["red", "blue", 'a "quoted" one', None, 3]},
    kind={"const": "Grüße"},
    nickname={"anyOf": [{"type": "string"}, {"type": "null"}]},
    code={"type": ["integer", "null"], "minimum": 1},
    pair={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
    empty={"type": "array", "minItems": 0, "maxItems": 0},
    nothing={"type": "object"},
    home={"$ref": "#/$defs/Home", "description": "where"},
) | {"$defs": {"Home": an_object(street={"type": "string"}, where=an_object(city={"type": "string"}))}}


def lay_out(denoiser: Denoiser, schema: dict[str, Any], max_tokens: int = 400) -> JsonCanvas:
    return JsonCanvas(schema, denoiser.reader.vocabulary, max_tokens)


def test_any_choice_within_a_pattern_is_valid(denoiser: Denoiser) -> None:
    """A network that writes at random, many times."""
    canvas = lay_out(denoiser, PERSON)
    assert canvas.length <= 400
    draw = random.Random(0)
    sets = [row.nonzero().flatten().tolist() for row in canvas.slots.sets]
    seen: dict[str, set[Any]] = {"age": set(), "colour": set(), "code": set(), "married": set()}
    for _ in range(200):
        tokens: dict[int, Any] = dict(canvas.fixed)
        for slot in canvas.slots.slots:
            for place, kind in enumerate(draw.choice(slot.patterns), start=slot.begin):
                assert place not in tokens
                tokens[place] = draw.choice(sets[kind])
        assert sorted(tokens) == list(range(canvas.length))
        text = denoiser.encoder.decode([tokens[place] for place in range(canvas.length)])
        value = json.loads(text)
        jsonschema.Draft202012Validator(PERSON).validate(value)
        for name, values in seen.items():
            values.add(value[name])
    assert len(seen["age"]) > 50
    assert seen["colour"] == {"red", "blue", 'a "quoted" one', None, 3}
    assert None in seen["code"]
    assert seen["married"] == {True, False}


@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 1.0}, {"threshold": 0.01}, {"remdm_cap": 0.3}, {"p2_eta": 1.0}]
)
def test_replies_are_valid(post: Call, knobs: dict[str, Any]) -> None:
    """In both dialects, streamed and whole, in blocks that cut values, and with rules that take tokens back."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    body = {"max_tokens": 300, "response_format": form, "block_length": 7, "seed": 1, "n": 2, **knobs}
    body |= {} if "threshold" in knobs else {"steps": 60}
    answer = post("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": "Who?"}]})
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.Draft202012Validator(PERSON).validate(json.loads(choice["message"]["content"]))
    streamed = post("/v1/completions", {**body, "prompt": "Go", "stream": True, "n": 1}).text
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    jsonschema.Draft202012Validator(PERSON).validate(json.loads(text))


@pytest.mark.parametrize("stream", [False, True])
def test_what_fills_a_place_up_is_no_token_of_the_reply(post: Call, denoiser: Denoiser, stream: bool) -> None:
    """A text of up to 64 tokens that has few; log-probabilities add up to what is read, and usage is their number."""
    schema = an_object(name={"type": "string"}, age={"type": "integer"})
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"max_tokens": 120, "steps": 20, "seed": 1, "temperature": 1.0, "n": 2, "response_format": form}
    body = {**asked, "messages": [{"role": "user", "content": "Who?"}]}
    plain = post("/v1/chat/completions", body).json()
    told = post("/v1/chat/completions", {**body, "logprobs": True}).json()
    assert told["usage"] == plain["usage"]
    tokens = 0
    for choice, other in zip(told["choices"], plain["choices"], strict=True):
        assert choice["message"] == other["message"]
        assert other["logprobs"] is None
        spelled = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"])
        assert spelled.decode() == choice["message"]["content"]
        tokens += len(choice["logprobs"]["content"])
    assert plain["usage"]["completion_tokens"] == tokens
    if stream:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        lines = post("/v1/chat/completions", {**body, **options}).text.splitlines()
        assert json.loads([line for line in lines if "{" in line][-1][6:])["usage"] == plain["usage"]
        lines = post("/v1/chat/completions", {**body, **options, "logprobs": True}).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        told = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
        assert sum(len(each["content"]) for each in told) == tokens
        assert all(each["content"] for each in told)


@pytest.mark.parametrize("ref", ["#/$defs/a~1b~0c", "#/%24defs/a%2Fb~0c", "#/$defs/a%7E1b%7e0c"])
def test_a_reference_is_a_json_pointer(denoiser: Denoiser, ref: str) -> None:
    """RFC 6901: of what is escaped, %xx first, then ~1, then ~0 (~01 is a ~ before a 1)."""
    definitions = {"a/b~c": {"const": "this"}, "a~1b": {"const": "that"}}
    tokens = [
        lay_out(denoiser, an_object(x=inner) | {"$defs": definitions}).fixed
        for inner in ({"$ref": ref}, {"const": "this"}, {"$ref": "#/$defs/a~01b"}, {"const": "that"})
    ]
    assert (tokens[0], tokens[2]) == (tokens[1], tokens[3])


@pytest.mark.parametrize(
    "inner, message",
    [
        ({"type": "string", "pattern": "a+"}, "$.x has 'pattern', which a canvas cannot promise"),
        ({"type": "string", "format": "date"}, "$.x has 'format'"),
        (
            {"type": "array", "items": {"type": "null"}},
            "$.x is an array: a canvas needs a fixed number of items",
        ),
        ({"anyOf": [an_object(), {"type": "null"}]}, "$.x chooses between an object and something else"),
        ({"type": "integer", "minimum": 5}, "$.x is an integer: bounds must be less than 256 apart"),
        ({"type": "integer", "multipleOf": 5}, "$.x has 'multipleOf'"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "between which there is no number"),
        ({"type": "number", "maximum": 5}, "$.x has 'maximum'"),
        ({"allOf": [{"type": "string"}]}, "$.x has 'allOf', which a canvas cannot promise"),
        ({"type": "text"}, '$.x has the type "text"'),
        ({}, "$.x has the type null: say which value it is"),
        (True, "$.x must be a schema, not true"),
        ({"$ref": "#/$defs/None"}, "refers to '#/$defs/None', which the schema does not hold"),
        ({"$ref": "#"}, "which the schema does not hold"),
        ({"$ref": "#/$defs/Node"}, "$.x.next refers to itself"),
        ({"enum": []}, "$.x has an enum that is no list of values"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "$.x has a minLength or maxLength"),
        ({"type": "string", "minLength": 900}, "tokens at the least, and max_tokens is 400"),
        # More than a machine could lay out before it is counted.
        ({"type": "string", "minLength": 10**15}, "tokens at the least, and max_tokens is 400"),
        (
            {"type": "string", "enum": ["a", 1]},
            "$.x has the value 1, which its type or its enum does not have",
        ),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "$.x has a oneOf whose options"),
        ({"oneOf": [{"type": "string"}, {"enum": ["a"]}]}, "$.x has a oneOf whose options"),
        ({"type": "integer", "const": True}, "$.x has the value true"),
        ({"enum": [2, True], "const": 1}, "$.x has the value 1"),
    ],
    ids=str,
)
def test_what_a_canvas_cannot_promise_is_refused_by_name(
    denoiser: Denoiser, inner: Any, message: str
) -> None:
    node = an_object(next={"$ref": "#/$defs/Node"})
    with pytest.raises(RequestError) as caught:
        lay_out(denoiser, an_object(x=inner) | {"$defs": {"Node": node}})
    assert caught.value.status == 400
    assert message in caught.value.message


@pytest.mark.parametrize(
    "schema",
    [{"type": "string"}, {}, {"type": "object", "required": ["x"]}, {"type": "object", "required": [["x"]]}],
)
def test_the_root_is_an_object(denoiser: Denoiser, schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="response_format: "):
        lay_out(denoiser, schema)


def test_what_a_small_schema_stands_for_is_counted_before_it_is_built(denoiser: Denoiser) -> None:
    """Alternatives of alternatives of strings; the same long list in many places; a chain that is deeper than Python's stack."""
    tree: dict[str, Any] = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 4} for n in range(14)}
    tree["d14"] = {"type": "string"}
    long = {"list": {"enum": [f"{n:03}" * 340 for n in range(256)]}}
    chain: dict[str, Any] = {f"d{n}": an_object(**{"": {"$ref": f"#/$defs/d{n + 1}"}}) for n in range(600)}
    chain["d600"] = {"type": "null"}
    places = {f"p{n}": {"$ref": "#/$defs/list"} for n in range(200)}
    for schema, message in [
        (an_object(x={"$ref": "#/$defs/d0"}) | {"$defs": tree}, "too many alternatives"),
        (an_object(**places) | {"$defs": long}, "lists values of more than 262,144 characters"),
        (an_object(x={"$ref": "#/$defs/d0"}) | {"$defs": chain}, "parts"),
    ]:
        with pytest.raises(RequestError, match=message) as caught:
            lay_out(denoiser, schema)
        assert caught.value.status == 400


@pytest.mark.parametrize("place", ["name", "const", "enum"])
def test_a_long_piece_of_a_schema_is_not_called_a_prompt(post: Call, place: str) -> None:
    long = "x" * 200_000
    schema = an_object(**{long: {"type": "null"}} if place == "name" else {"y": {"enum": ["a", long]}})
    if place == "const":
        schema = an_object(y={"const": long})
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = post("/v1/completions", {"prompt": "Go", "response_format": form})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "response_format")
    known = (
        "is nested too deeply, or has too long a name" if place == "name" else "but the schema has 200,002"
    )
    assert known in error["message"]


def test_no_schema_is_a_fault_of_the_server(post: Call) -> None:
    """Schemas in ruins, nested deeply, and far too large."""
    draw, parts = random.Random(1), [None, 1, "x", [], {}, True, -1, 1e9, "object", "string"]
    names = [
        "type",
        "properties",
        "required",
        "enum",
        "anyOf",
        "$ref",
        "items",
        "minItems",
        "minimum",
        "maxLength",
    ]

    def ruin(depth: int) -> Any:
        if depth == 0 or draw.random() < 0.2:
            return draw.choice(parts)
        if draw.random() < 0.2:
            return [ruin(depth - 1) for _ in range(draw.randrange(3))]
        return {draw.choice(names): ruin(depth - 1) for _ in range(draw.randrange(4))}

    deep: Any = {"type": "null"}
    union: Any = {"type": "null"}
    for _ in range(200):
        deep, union = an_object(a=deep), {"anyOf": [union, {"type": "null"}]}
    schemas = [deep, an_object(x=union), an_object(x={"enum": list(range(10**5))})]
    schemas += [{"type": "object", "properties": {"a": ruin(4)}} for _ in range(60)]
    for schema in schemas:
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        answer = post(
            "/v1/completions", {"prompt": "Go", "max_tokens": 64, "steps": 8, "response_format": form}
        )
        assert answer.status_code in (200, 400), (schema, answer.text)
