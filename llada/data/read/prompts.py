"""Prompts in files of lines: JSON, {"prompt": text} or {"messages": [...]}, or plain text in a .txt file.

Millions of them are nowhere held: `scan_prompts` goes through the files once, says what is wrong, and cuts them into shards, which
are read again by whoever answers them. A conversation is read as training data are, with what stands beside it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypedDict

from llada.data.document import text_problem
from llada.data.read.dialogues import FIELDS, RecordError, parse_dialogue
from llada.data.read.parts import InputFile
from llada.errors import UserError
from llada.files import fetch_ranges, open_bytes, storage_errors

ENDINGS = (".jsonl", ".ndjson", ".txt")
_log = logging.getLogger(__name__)
_BESIDE = (*FIELDS["system"], *FIELDS["context"], *FIELDS["tools"])
_MOST_BAD = 0.1  # of the lines: with more, the files are something else
_TOLD = 20  # bad lines that the log names; their answers name them all
_READ_BYTES = 1 << 20

# A line of the prompts as it stands there: "prompt" or "messages" and whatever else its writer has put into it.
Record = dict[str, Any]


class PromptLine(NamedTuple):
    """A line, what it asks, or why that cannot be answered, and what its conversation may call."""

    record: Record
    prompt: str | list[Record] = ""
    """Text, or the turns of a conversation."""
    problem: str | None = None
    tools: Sequence[Any] = ()


class PromptShard(TypedDict):
    """So many prompts of one file."""

    name: str
    """The number of the first of them, which sorts as it counts."""
    url: str
    start: int
    end: int
    """Its bytes [start, end)."""
    line: int
    """Of the file, from 1, where it starts."""
    first: int
    """The number of its first prompt among those of all files, from 0."""
    rows: int


@dataclass(frozen=True)
class PromptScan:
    """What a pass through the files has found."""

    shards: list[PromptShard]
    num_prompts: int
    names: frozenset[str]
    """Those of the names asked about that are fields of some line."""
    id: str
    """Changes with the content: of one file, the first 16 digits of its SHA-256."""


def scan_prompts(
    files: Sequence[InputFile],
    *,
    rows: int,
    chat: bool,
    asked: Callable[[str], bool] = lambda name: False,
    told: Callable[[int], object] = lambda size: None,
) -> PromptScan:
    """Cut the non-empty lines of the files into shards of `rows` prompts, those of a file's end fewer.

    Args:
        chat: a prompt that is text is what a user says.
        asked: of a field's name, whether it is to be in `names`.
        told: hears of every line how many bytes it had.

    Lines that are no prompts are logged. Raises UserError naming the first of them when they are many, or all.
    """
    shards: list[PromptShard] = []
    digests: list[str] = []
    names: set[str] = set()
    problems: list[str] = []
    count = num_bad = 0
    for file in files:
        digest = hashlib.sha256()
        begun: PromptShard | None = None
        with storage_errors(file.url), open_bytes(file.url) as stream:
            for number, (start, raw) in enumerate(_raw_lines(stream), start=1):
                digest.update(raw)
                told(len(raw))
                line = _parse(raw, file.url, number, chat=chat)
                if line is None:
                    continue
                if line.problem is not None:
                    num_bad += 1
                    if num_bad <= _TOLD:
                        problems.append(line.problem)
                names.update(filter(asked, line.record))
                if begun is None or begun["rows"] == rows:
                    begun = {
                        "name": f"{count:010d}",
                        "url": file.url,
                        "start": start,
                        "end": start,
                        "line": number,
                        "first": count,
                        "rows": 0,
                    }
                    shards.append(begun)
                begun["rows"] += 1
                begun["end"] = start + len(raw)
                count += 1
        digests.append(digest.hexdigest())
    if not count:
        raise UserError(f"{', '.join(file.url for file in files[:3])} holds no prompt")
    if num_bad > _MOST_BAD * count:
        others = f"; {num_bad - 1:,} more of {count:,} lines cannot be used either" if num_bad > 1 else ""
        raise UserError(problems[0] + others)
    for problem in problems:
        _log.warning("%s; the other lines are answered", problem)
    if num_bad > len(problems):
        _log.warning("%d more lines cannot be used; their answers say why", num_bad - len(problems))
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return PromptScan(shards, count, frozenset(names), whole[:16])


def read_shard(shard: PromptShard, *, chat: bool) -> list[PromptLine]:
    """Its prompts. Raises UserError where the file is not as it was scanned."""
    (data,) = fetch_ranges([(shard["url"], shard["start"], shard["end"])])
    raw = data.split(b"\n")  # not splitlines: JSON strings may hold U+2028
    lines = [
        _parse(text, shard["url"], number, chat=chat) for number, text in enumerate(raw, start=shard["line"])
    ]
    found = [line for line in lines if line is not None]
    if len(found) != shard["rows"]:
        raise UserError(f"{shard['url']} has changed while it was read; give a new --output")
    return found


def _raw_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(where it starts, the line with its end) of each line."""
    at, rest = 0, b""
    while data := stream.read(_READ_BYTES):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield at, line + b"\n"
            at += len(line) + 1
    if rest:
        yield at, rest


def _parse(raw: bytes, url: str, number: int, *, chat: bool) -> PromptLine | None:
    """What the line `number` of a file holds, from 1; None: nothing."""
    if number == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        return None
    line = raw.removesuffix(b"\n").removesuffix(b"\r")
    return parse_prompt(line, f"{url}:{number}", is_text=url.endswith(".txt"), chat=chat)


def parse_prompt(line: bytes, place: str, *, is_text: bool, chat: bool) -> PromptLine:
    """A line without its end. `place`: for what is said about it."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return PromptLine(
            {}, problem=f"{place} is not UTF-8 text ({error.reason} at byte {error.start} of the line)"
        )
    record: Any = {"prompt": text}
    if not is_text:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            return PromptLine({}, problem=f"{place}: not JSON ({error})")
    if not isinstance(record, dict):
        record = {}
    prompt, messages = record.get("prompt"), record.get("messages")
    if messages is not None and prompt is not None:
        return PromptLine(
            record, problem=f"{place}: a prompt line holds either a prompt or messages, not both"
        )
    beside = {name: record[name] for name in _BESIDE if record.get(name)}
    if chat and beside and isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    if messages is not None:
        try:
            told = parse_dialogue({"messages": messages, **beside})
        except RecordError as error:
            return PromptLine(record, problem=f"{place}: the messages cannot be used ({error})")
        turns = [{key: value for key, value in turn.items() if key != "trained"} for turn in told.messages]
        return PromptLine(record, turns, tools=told.tools)
    if not isinstance(prompt, str):
        return PromptLine(
            record, problem=f'{place}: a prompt line is {{"prompt": text}} or {{"messages": [...]}}'
        )
    if text_problem(prompt) == "not_utf8":
        return PromptLine(
            record, problem=f"{place}: the prompt holds half of a surrogate pair, which is no text"
        )
    return PromptLine(record, [{"role": "user", "content": prompt}] if chat else prompt)
