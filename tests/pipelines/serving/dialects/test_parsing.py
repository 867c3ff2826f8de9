"""What is no object of a body's fields is refused, in words that its sender understands."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipelines.serving.dialects.completions import CompletionBody
from pipelines.serving.dialects.parsing import parse_body
from pipelines.serving.errors import RequestError


def problem(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_body(CompletionBody, json.dumps({"prompt": "Go", **fields}).encode())
    return caught.value


def test_misspelt_names_come_with_the_nearest() -> None:
    assert problem(stepz=3).message == "unknown field 'stepz'; did you mean 'steps'?"
    inside = problem(stream=True, stream_options={"include_usag": True})
    assert "did you mean 'include_usage'?" in inside.message
    assert inside.param == "stream_options.include_usag"
    form = {"type": "json_schema", "json_schema": {"schema": {}, "scheme": {}}}
    assert "did you mean 'schema'?" in problem(response_format=form).message


@pytest.mark.parametrize(
    "raw, message",
    [
        (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),  # half a surrogate pair in bytes
        (b'{"prompt": "\\ud800"}', "UTF-8"),  # and spelt out
        (b'{"\\udfff": 1, "prompt": "x"}', "UTF-8"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16"), "UTF-8"),
        ('{"prompt": "x"}'.encode("utf-32-le"), "body"),
        (b"[" * 100_000, "body"),
        (b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}", "body"),
        (b'{"prompt": "x", "seed": 1, "seed": 2}', "the body says 'seed' twice"),
        (b'{"prompt": "x", "stream": true, "stream_options": {"a": 1, "a": 1}}', "the body says 'a' twice"),
    ],
    ids=lambda value: str(value[:30]),
)
def test_what_is_no_json_text_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse_body(CompletionBody, raw)
    assert caught.value.status == 400
    json.dumps(caught.value.body(), ensure_ascii=False).encode()  # can be sent


def test_a_byte_order_mark_is_no_fault() -> None:
    assert parse_body(CompletionBody, b"\xef\xbb\xbf" + b'{"prompt": "x"}').prompt == ["x"]


def test_what_a_client_sends_is_repeated_in_part() -> None:
    long = "x" * 100_000
    for fields in ({long: 1}, {"remasking": long}, {"tools": [long]}, {"stop": [long]}, {"stream": long}):
        error = problem(**fields).body()["error"]
        assert len(json.dumps(error)) < 1500
