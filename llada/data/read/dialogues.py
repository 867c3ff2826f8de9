"""Records to dialogues (LLaDA's SFT data, facts of its paper's section 2.3).

Four record shapes are understood:
    {"messages": [{"role", "content"}, ...]}        {"prompt", "response"}
    {"conversations": [{"from", "value"}, ...]}     {"question", "answer"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llada.data.document import Document, Message, dialogue, prompt_answer_pairs, text_problem
from llada.data.outcomes import Rejects
from llada.data.read.cleaning import clean_text
from llada.data.read.formats import read_records
from llada.data.read.parts import Part, ReadOptions

_SENDERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PAIRS = (("prompt", "response"), ("question", "answer"))


class RecordError(ValueError):
    """A record that is no dialogue; the message is a short reason for the statistics, such as "empty_text"."""


def read_dialogues(part: Part, rejects: Rejects, options: ReadOptions) -> Iterator[Document]:
    """The dialogues of a part, their messages cleaned, each with at least one answer. Other records are rejected."""
    for record in read_records(part, rejects, options):
        try:
            messages: list[Message] = [
                {"role": message["role"], "content": clean_text(message["content"])}
                for message in parse_dialogue(record.fields)
            ]
            if not prompt_answer_pairs(messages):
                raise RecordError("no_answer")
        except RecordError as problem:
            if record.is_only and str(problem) == "unknown_sft_format":
                rejects.leave_out("JSON object that is no dialogue", part.label)
                continue
            excerpt = json.dumps(record.fields, default=str, ensure_ascii=False)
            rejects.add(str(problem), part.label, record.line, excerpt)
            continue
        yield dialogue(messages)


def parse_dialogue(record: Mapping[str, Any]) -> list[Message]:
    """The messages of a record in any of the four shapes. Raises RecordError."""
    if "messages" in record:
        return _messages(record["messages"], "role", "content")
    if "conversations" in record:
        return _messages(record["conversations"], "from", "value")
    for prompt, response in _PAIRS:
        if prompt in record and response in record:
            turns = [
                {"role": "user", "content": record[prompt]},
                {"role": "assistant", "content": record[response]},
            ]
            return _messages(turns, "role", "content")
    raise RecordError("unknown_sft_format")


def _messages(turns: Any, role_key: str, content_key: str) -> list[Message]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise RecordError("no_messages")
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise RecordError("message_not_an_object")
        role = _SENDERS.get(str(turn.get(role_key)))
        if role is None:
            raise RecordError("unknown_role")
        content = turn.get(content_key)
        if not isinstance(content, str) or text_problem(content):
            raise RecordError(text_problem(content) or "text_not_a_string")
        messages.append({"role": role, "content": content})
    return messages
