"""Rows and texts of local files, and what is wrong with them in one line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from llada.errors import UserError
from llada.evals.local_rows import field_of, is_readable, read_rows, read_text, stem_of


def test_rows_are_read_compressed_or_not(tmp_path: Path) -> None:
    lines = '{"a": 1}\n\n{"a": "\\u2028", "b": "\\ud83d\\ude00"}\n'
    (tmp_path / "rows.jsonl").write_text("\ufeff" + lines)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as stream:
        stream.write(lines)
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        assert read_rows(str(tmp_path / name)) == [{"a": 1}, {"a": "\u2028", "b": "😀"}]
    (tmp_path / "rows.json").write_text('[{"a": 1},\n {"a": 2}]')
    assert read_rows(str(tmp_path / "rows.json")) == [{"a": 1}, {"a": 2}]
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo")
    assert read_text(str(tmp_path / "a.txt")) == "one\ntwo"


def test_names_say_what_is_read() -> None:
    assert [is_readable(name) for name in ("a.txt", "a.JSONL.zst", "a.ndjson", "a.gz", "a.parquet")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert stem_of("s3://bucket/x/ptb.txt.gz") == "ptb"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"{}", r"a\.txt must be JSON lines"),
        ("a.jsonl", b"{}\n{", r"a\.jsonl, line 2 is no JSON"),
        ("a.jsonl", b"[1]", r"a\.jsonl, row 1 is no JSON object"),
        ("a.jsonl", b"\n", r"a\.jsonl holds no rows"),
        ("a.jsonl", b"\xff{}", r"a\.jsonl is no sound UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-5], r"a\.jsonl\.gz is no sound UTF-8 text"),
        (
            "a.jsonl",
            rb'{"a": "\ud83d\ude00"}' + b"\n" + rb'{"b": ["x \uD83D y"]}',
            r"a\.jsonl, row 2 holds '\\ud83d', half of a surrogate pair, which is no text",
        ),
        ("a.json", rb'[{"a": 1}, {"\udc00": 2}]', r"a\.json, row 2 holds '\\udc00', half of"),
        ("a.jsonl", None, r"there is no file .*a\.jsonl"),
    ],
    ids=str,
)
def test_what_holds_no_rows_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_field_that_is_not_there_or_not_so() -> None:
    assert field_of({"text": "x"}, "text", str, "f, row 1") == "x"
    with pytest.raises(UserError, match=r"f, row 1 has no field 'txt'; did you mean 'text'"):
        field_of({"text": "x"}, "txt", str, "f, row 1")
    with pytest.raises(UserError, match="f, row 1: the field 'label' must be int or str, not True"):
        field_of({"label": True}, "label", (int, str), "f, row 1")
