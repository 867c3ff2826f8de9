"""Dialogues to training examples (LLaDA's SFT data, facts of its paper's section 2.3).

An n-turn dialogue gives n examples, each with everything before the answer as its prompt; LLaDA draws one of the n at
random (`PrepareConfig.turns`).

The answer's tokens are its text, `<|eot_id|>` and the end-of-text token: the chat template closes every message with
eot, so that is what the model must learn to write, and end-of-text says that the canvas is over. LLaDA's guideline
shows end-of-text alone; its shipped template does not agree with it. Another template's end of a turn takes eot's place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llada.data.document import Message
from llada.tokenizer import END_HEADER, TemplateRefusalError, holds_words, render_chat, render_exchange

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TooLong = Literal["drop", "truncate_prompt"]

TOO_LONG = "example_longer_than_row"
NO_WORDS = "not_in_vocabulary"
REFUSED = "refused_by_template"
_REASON_CHARS = 100
_BLANK_LINES = re.compile(r"(?:[^\S\n]*\n)+")


class Example(NamedTuple):
    """A prompt and its answer as tokens."""

    tokens: list[int]
    answer_start: int
    is_truncated: bool
    """Whether the prompt lost its beginning."""


def encode_example(
    tokenizer: PreTrainedTokenizerFast,
    history: Sequence[Message],
    answer: Message,
    *,
    tools: Sequence[Any] = (),
    row_length: int,
    too_long: TooLong = "drop",
) -> Example | str:
    """One example of at most `row_length` tokens, or why there is none: TOO_LONG, NO_WORDS (none of the answer is in the
    vocabulary), or REFUSED with what the template says behind a colon.

    "truncate_prompt" forgets the oldest messages (never a leading system message) and then, if one message is left,
    its beginning; the answer is never cut, and a prompt keeps at least half of the row or its own length.
    """
    told = {**answer, "content": _answer_text(answer["content"])}
    try:
        prompt, answer_ids = render_exchange(tokenizer, history, told, tools=tools)
    except TemplateRefusalError as refusal:
        return f"{REFUSED}: {refusal.reason[:_REASON_CHARS]}"
    if not holds_words(tokenizer, answer_ids):
        return NO_WORDS
    if answer_ids[-1] != tokenizer.eos_token_id:
        answer_ids.append(tokenizer.eos_token_id)
    room = row_length - len(answer_ids)
    whole = len(prompt)
    if whole > room and too_long == "truncate_prompt" and room >= row_length // 2:
        prompt = _shorten(tokenizer, list(history), tools, room) or prompt
    return TOO_LONG if len(prompt) > room else Example(prompt + answer_ids, len(prompt), len(prompt) < whole)


def _answer_text(content: str) -> str:
    """An answer without empty lines around it. The indentation of its first line stays, as code needs it; a lone space,
    which in pairs of prompt and completion only parts the two, does not."""
    text = content.rstrip()
    if blank := _BLANK_LINES.match(text):
        text = text[blank.end() :]
    return text[1:] if text[:1] == " " and not text[1:2].isspace() else text


def _shorten(
    tokenizer: PreTrainedTokenizerFast, history: list[Message], tools: Sequence[Any], room: int
) -> list[int] | None:
    """The prompt ids of the newest part of `history` that fits `room`; None when there is none."""
    fixed = 1 if history[0]["role"] == "system" else 0
    prompt = None
    while True:
        try:
            prompt = render_chat(tokenizer, history, tools=tools)
        except TemplateRefusalError:
            prompt = None  # a template may want a question first: forget one more
        if (prompt is not None and len(prompt) <= room) or len(history) <= fixed + 1:
            break
        del history[fixed]
    if prompt is None or (surplus := len(prompt) - room) <= 0:
        return prompt
    headers = [i for i, token in enumerate(prompt) if token == tokenizer.convert_tokens_to_ids(END_HEADER)]
    if len(headers) < fixed + 2:
        return None  # where a message begins is known of LLaDA's headers alone
    begin = headers[fixed] + 1  # the message to shorten starts here; the last header is the open one
    end = headers[fixed + 1] - 1
    return prompt if surplus >= end - begin else prompt[:begin] + prompt[begin + surplus :]
