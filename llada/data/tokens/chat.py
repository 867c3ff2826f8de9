"""Dialogues to training examples (LLaDA's SFT data, facts of its paper's section 2.3).

An n-turn dialogue gives n examples, each with everything before the answer as its prompt (LLaDA draws one of the n at
random; all are kept here, so that nothing depends on chance).

The answer's tokens are its text, `<|eot_id|>` and the end-of-text token: the chat template closes every message with
eot, so that is what the model must learn to write, and end-of-text says that the canvas is over. LLaDA's guideline
shows end-of-text alone; its shipped template does not agree with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerFast

from llada.data.document import Message
from llada.tokenizer import END_HEADER, END_OF_TURN, encode_texts, render_chat

TooLong = Literal["drop", "truncate_prompt"]


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
