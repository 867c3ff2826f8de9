"""SFT records to training examples (LLaDA's SFT data, facts of its paper's section 2.3).

Four record shapes are understood:
    {"messages": [{"role", "content"}, ...]}        {"prompt", "response"}
    {"conversations": [{"from", "value"}, ...]}     {"question", "answer"}
An n-turn dialogue gives n examples, each with everything before the answer as its prompt (LLaDA draws one of the n at
random; all are kept here, so that nothing depends on chance).

The answer's tokens are its text, `<|eot_id|>` and the end-of-text token: the chat template closes every message with
eot, so that is what the model must learn to write, and end-of-text says that the canvas is over. LLaDA's guideline
shows end-of-text alone; its shipped template does not agree with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerFast

from llada.data.read.formats import text_problem
from llada.tokenizer import END_HEADER, END_OF_TURN, encode_texts, render_chat

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
TooLong = Literal["drop", "truncate_prompt"]
_SENDERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PAIRS = (("prompt", "response"), ("question", "answer"))


class RecordError(ValueError):
    """A record that is no dialogue; the message is a short reason for the statistics, such as "empty_text"."""


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


def prompt_answer_pairs(messages: Sequence[Message]) -> list[tuple[list[Message], str]]:
    """(history, answer) for every assistant message that answers something. Raises RecordError when there is none."""
    pairs = [
        (list(messages[:turn]), message["content"])
        for turn, message in enumerate(messages)
        if message["role"] == "assistant" and any(m["role"] == "user" for m in messages[:turn])
    ]
    if not pairs:
        raise RecordError("no_answer")
    return pairs


class Example(NamedTuple):
    """A prompt and its answer as tokens."""

    tokens: list[int]
    answer_start: int
    is_truncated: bool
    """Whether the prompt lost its beginning."""


def encode_example(
    tokenizer: PreTrainedTokenizerFast,
    history: Sequence[Message],
    answer: str,
    *,
    row_length: int,
    too_long: TooLong = "drop",
) -> Example | None:
    """One example of at most `row_length` tokens, or None when it does not fit.

    "truncate_prompt" forgets the oldest messages (never a leading system message) and then, if one message is left,
    its beginning; the answer is never cut, and a prompt keeps at least half of the row or its own length.
    """
    closing = [tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.eos_token_id]
    answer_ids = encode_texts(tokenizer, [answer.strip()])[0] + closing
    room = row_length - len(answer_ids)
    prompt = render_chat(tokenizer, history)
    whole = len(prompt)
    if whole > room and too_long == "truncate_prompt" and room >= row_length // 2:
        prompt = _shorten(tokenizer, list(history), room)
    return None if len(prompt) > room else Example(prompt + answer_ids, len(prompt), len(prompt) < whole)


def _shorten(tokenizer: PreTrainedTokenizerFast, history: list[Message], room: int) -> list[int]:
    """The prompt ids of the newest part of `history` that fits `room`."""
    fixed = 1 if history[0]["role"] == "system" else 0
    while len(prompt := render_chat(tokenizer, history)) > room and len(history) > fixed + 1:
        del history[fixed]
    surplus = len(prompt) - room
    if surplus <= 0:
        return prompt
    headers = [i for i, token in enumerate(prompt) if token == tokenizer.convert_tokens_to_ids(END_HEADER)]
    begin = headers[fixed] + 1  # the message to shorten starts here; the last header is the open one
    end = headers[fixed + 1] - 1
    return prompt if surplus >= end - begin else prompt[:begin] + prompt[begin + surplus :]
