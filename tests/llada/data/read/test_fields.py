"""llada/data/read/fields.py: nested fields, and values that are text in another form; the same in every format."""

import json

import pytest

from llada.data.read.fields import MISSING, field_of, no_field, text_of


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [
        ({"a": 1}, "a", 1),
        ({"a": None}, "a", None),
        ({}, "a", MISSING),
        ({"a": {"b": 1}}, "a.b", 1),
        ({"a": {"b": {"c": 1}}}, "a.b.c", 1),
        ({"a.b": 2, "a": {"b": 1}}, "a.b", 2),
        ({"a": {}}, "a.b", MISSING),
        ({"a": None}, "a.b", MISSING),
        ({"a": "b"}, "a.b", MISSING),
        ({"a": [{"b": 1}]}, "a.b", MISSING),
    ],
)
def test_a_field_by_its_name(record, name, value):
    assert field_of(record, name) is value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (b"\xc3\xa9", "é"),
        (["a", None, "b"], "a\nb"),
        ([], []),
        (["a", 1], ["a", 1]),
        (5, 5),
        (None, None),
    ],
)
def test_the_text_of_a_value(value, text):
    assert text_of(value) == text


def test_bytes_that_are_no_text():
    with pytest.raises(UnicodeDecodeError):
        text_of(b"\xe9")
    assert text_of(b"\xe9", "latin-1") == "é"


def test_the_fields_that_are_there_are_named():
    assert no_field("text", ["a", "b"]) == "no field 'text', but 'a', 'b'; see read.text_field"
    assert no_field("text", []) == "no field 'text', but none at all; see read.text_field"
    assert no_field("text", map(str, range(50))).endswith("'19', ...; see read.text_field")


def test_json_lines_follow_the_same_rules(tmp_path, read):
    records = [
        {"a": {"b": "one"}}, {"a.b": "two", "a": {"b": "x"}}, {"a": {"b": ["three", "lines"]}},
        {"a": {"b": 5}}, {"a": "no object"}, {"b": 1, "c": 2},
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    texts, rejects = read(path, text_field="a.b")
    assert texts == ["one", "two", "three\nlines"]
    assert dict(rejects.counts) == {"text_not_a_string": 1, "missing_text": 2}
    assert "no field 'a.b', but 'a'; see read.text_field (2 times)" in rejects.file_problems()[str(path)]
