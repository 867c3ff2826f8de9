"""Prompts: what a line holds, what is wrong with one, and shards that hold the lines of their files, each once."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from llada.data.read.parts import InputFile
from llada.data.read.prompts import PromptLine, parse_prompt, read_shard, scan_prompts
from llada.errors import UserError
from llada.files import write_bytes


def file_of(folder: Path, data: bytes, name: str = "a.jsonl") -> InputFile:
    (folder / name).write_bytes(data)
    return InputFile(str(folder / name), name, len(data), "")


def lines_of(folder: Path, data: bytes, name: str = "a.jsonl", *, chat: bool = False) -> list[PromptLine]:
    """All lines of a file with these bytes."""
    scan = scan_prompts([file_of(folder, data, name)], rows=512, chat=chat)
    return [line for shard in scan.shards for line in read_shard(shard, chat=chat)]


def records(folder: Path, data: bytes, name: str = "a.jsonl", *, chat: bool = False) -> list[dict]:
    lines = lines_of(folder, data, name, chat=chat)
    assert all(line.problem is None for line in lines)
    return [line.record for line in lines]


def numbered(count: int, name: str = "") -> bytes:
    return b"".join(json.dumps({"prompt": f"{name}{i}"}).encode() + b"\n" for i in range(count))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
def test_shards_hold_each_line_once_and_in_order(tmp_path: Path, rows: int) -> None:
    draw = random.Random(rows)
    contents = []
    for number in range(3):
        lines = numbered(draw.randrange(1, 9), f"{number}-").split(b"\n")
        for _ in range(4):
            lines.insert(draw.randrange(len(lines)), draw.choice([b"", b" \r", b"\t"]))
        contents.append(b"\n".join(lines) + draw.choice([b"", b"\n", b"\n\n"]))
    files = [file_of(tmp_path, data, f"{number}.jsonl") for number, data in enumerate(contents)]
    scan = scan_prompts(files, rows=rows, chat=False)
    shards = [read_shard(shard, chat=False) for shard in scan.shards]
    whole = [json.loads(line) for data in contents for line in data.split(b"\n") if line.strip()]
    assert [line.record for lines in shards for line in lines] == whole
    assert scan.num_prompts == len(whole)
    assert [shard["first"] for shard in scan.shards] == [
        sum(map(len, shards[:number])) for number in range(len(shards))
    ]
    assert [shard["name"] for shard in scan.shards] == sorted(shard["name"] for shard in scan.shards)
    assert max(map(len, shards)) <= rows
    assert len({shard["url"] for shard in scan.shards}) == 3


def test_the_content_gives_the_id_and_the_lines_the_names(tmp_path: Path) -> None:
    data = numbered(3) + b'{"prompt": "x", "generated_": 1, "text": 2, "other": 3}'
    scan = scan_prompts([file_of(tmp_path, data)], rows=2, chat=False, asked=lambda name: name != "other")
    assert scan.id == hashlib.sha256(data).hexdigest()[:16]
    assert scan.names == {"prompt", "generated_", "text"}
    two = [file_of(tmp_path, data, "b.jsonl"), file_of(tmp_path, b"x", "c.txt")]
    assert len({scan.id, *(scan_prompts(files, rows=2, chat=False).id for files in (two, two[::-1]))}) == 3


def test_every_byte_is_told_of(tmp_path: Path) -> None:
    data, told = numbered(60_000) + b"\n{", []
    scan_prompts([file_of(tmp_path, data)], rows=512, chat=False, told=told.append)
    assert sum(told) == len(data) > 1 << 20  # more than is read at a time


def test_a_file_that_has_changed_is_not_taken_for_another(tmp_path: Path) -> None:
    file = file_of(tmp_path, numbered(4))
    first, _ = scan_prompts([file], rows=2, chat=False).shards
    write_bytes(file.url, b"\n" * file.size)
    with pytest.raises(UserError, match="a.jsonl has changed while it was read"):
        read_shard(first, chat=False)


def test_bad_lines_keep_their_numbers_in_any_shard(tmp_path: Path) -> None:
    data = b"\n" + numbered(20) + b"{\n" + numbered(2)
    scan = scan_prompts([file_of(tmp_path, data)], rows=4, chat=False)
    bad = [line for shard in scan.shards for line in read_shard(shard, chat=False) if line.problem]
    assert [re.sub(".*/", "", line.problem or "")[:23] for line in bad] == ["a.jsonl:22: not JSON (E"]


def test_of_many_bad_lines_the_log_names_some(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scan_prompts([file_of(tmp_path, numbered(400) + b"{\n" * 30)], rows=512, chat=False)
    assert len(caplog.records) == 21
    assert "10 more lines" in caplog.text


def test_a_line_separator_inside_a_prompt_is_text(tmp_path: Path) -> None:
    line = '{"prompt": "one\u2028two\u0085three"}'
    assert records(tmp_path, f"{line}\n{line}\n".encode()) == [json.loads(line)] * 2


def test_files_of_other_systems(tmp_path: Path) -> None:
    assert records(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n \n{"prompt": "b"}') == [
        {"prompt": "a"},
        {"prompt": "b"},
    ]
    assert records(tmp_path, b"\xef\xbb\xbfone\r\n\r\n two \r\n", "a.txt") == [
        {"prompt": "one"},
        {"prompt": " two "},
    ]


def test_messages_are_read_as_in_training(tmp_path: Path) -> None:
    turns = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
    ]
    turns.append({"role": "assistant", "content": "a", "weight": 0})
    record = {"messages": turns, "prompt": None, "id": 3}
    (line,) = lines_of(tmp_path, json.dumps(record).encode())
    said = [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert line == (record, [{"role": role, "content": text} for role, text in said], None, [])
    record = {"prompt": "x", "text": "own"}
    (line,) = lines_of(tmp_path, json.dumps(record).encode(), chat=True)
    assert line == (record, [{"role": "user", "content": "x"}], None, ())


def test_what_stands_beside_a_conversation_is_part_of_it() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    beside = {"system": "s", "context": "c", "tools": tools}
    told = [{"role": "system", "content": "s"}, {"role": "user", "content": "q\n\nc"}]
    for asked, chat in (({"messages": [{"role": "user", "content": "q"}]}, False), ({"prompt": "q"}, True)):
        record = {**asked, **beside}
        line = parse_prompt(json.dumps(record).encode(), "a.jsonl:1", is_text=False, chat=chat)
        assert line == (record, told, None, tools)
    line = parse_prompt(json.dumps(record).encode(), "a.jsonl:1", is_text=False, chat=False)
    assert line == (record, "q", None, ())


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"{", "a.jsonl:7: not JSON"),
        (b"[" * 100_000, "a.jsonl:7: not JSON"),
        (b'["x"]', "a.jsonl:7: a prompt line is"),
        (b'{"prompt": "a\\ud800"}', "a.jsonl:7: the prompt holds half of a surrogate pair"),
        (b'{"prompt": "a\xed\xa0\x80"}', "a.jsonl:7 is not UTF-8 text"),
        (b'{"messages": [{"role": "user", "content": "a\\ud800"}]}', r"a.jsonl:7: .*\(not_utf8\)"),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "tools": ["\\ud800"]}',
            r"a.jsonl:7: .*\(not_utf8\)",
        ),
        (b'{"prompt": "x", "messages": []}', "a.jsonl:7: .* not both"),
    ],
)
def test_one_bad_line_among_many_is_said_and_the_others_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: bytes, problem: str
) -> None:
    lines = [b'{"prompt": "x"}'] * 20
    found = lines_of(tmp_path, b"\n".join([*lines[:6], bad, *lines[6:]]))
    assert [line.problem is None for line in found] == [True] * 6 + [False] + [True] * 14
    assert re.search(problem, found[6].problem or "")
    assert [re.search(problem, record.getMessage()) is not None for record in caplog.records] == [True]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a.jsonl:1: a prompt line is .*; 1 more of 3 lines cannot be used either"
    ):
        lines_of(tmp_path, b'{"text": "a"}\n{"text": "b"}\n{"prompt": "c"}')
