"""The model's side of reading a prompt: text, conversations and token ids become ids that its canvas may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import jinja2
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.tokenizer import encode_texts, render_chat
from pipelines.serving.errors import RequestError, shorten

# What a field holds, where it is no prompt.
_SUBJECTS = {"suffix": "suffix", "response_format": "schema", "tokens": "list of ids"}
# Of these, what is no part of a prompt either: replies have it.
_OF_REPLIES = {"response_format", "tokens"}


class PromptEncoder:
    """Turns what the dialects (pipelines/serving/dialects) were sent into token ids. All errors are RequestErrors 400."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        vocab_size: int,
        mask_id: int,
        max_length: int,
        max_prompt_tokens: int | None = None,
    ) -> None:
        """`max_length`: the model's context, in tokens; `max_prompt_tokens`: what the endpoint takes, if that is less. What is
        certain to exceed it is refused before it is encoded."""
        self._tokenizer, self._vocab_size, self._mask_id = tokenizer, vocab_size, mask_id
        self.context_length = max_length
        self.max_length = max_length if max_prompt_tokens is None else min(max_length, max_prompt_tokens)
        # A token's name has at least as many bytes as the text that it stands for.
        self._token_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())
        self._special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that do not show in text."""
        return frozenset(self._special.values())

    def encode_text(self, text: str, field: str = "prompt") -> list[int]:
        """The ids of plain text that stands in `field`. Raises RequestError for more than the context could hold."""
        self._refuse_too_long(text, field)
        return encode_texts(self._tokenizer, [text])[0] if text else []

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of {"role", "content"} turns up to the open turn of the assistant.

        Raises RequestError when the tokenizer has no chat template, its template refuses the turns, or they have more
        text than the context could hold.
        """
        self._refuse_too_long("".join(turn["content"] for turn in messages), "messages")
        try:
            return render_chat(self._tokenizer, messages)
        except (UserError, jinja2.TemplateError) as error:
            raise RequestError(400, str(error), param="messages") from None

    def check_ids(self, ids: Sequence[int], field: str = "prompt") -> list[int]:
        """The ids themselves, which stand in `field`. Raises RequestError for one that is no token or the mask, and for too
        many of them."""
        if len(ids) > self._most(field):
            self._refuse(f"{len(ids):,} tokens", field)
        for token in ids:
            if not 0 <= token < self._vocab_size:
                message = f"{field}: token id {shorten(str(token))} lies outside the vocabulary of {self._vocab_size}"
                raise RequestError(400, message, param=field)
            if token == self._mask_id:
                remedy = (
                    "; to fill a gap, send prompt and suffix" if field == "prompt" else ", which has no text"
                )
                raise RequestError(400, f"{field}: token id {token} is the mask{remedy}", param=field)
        return list(ids)

    def find_stop_tokens(self, stops: Sequence[str]) -> frozenset[int]:
        """The ids of the special tokens that are stop strings.

        Raises RequestError for the mask, and for a stop string that has a special token among other text: special
        tokens do not show in a reply, so that no reply could ever hold it.
        """
        found = set()
        for stop in stops:
            if stop in self._special:
                found.add(self._special[stop])
            elif inside := next((token for token in self._special if token in stop), None):
                message = f"stop: {shorten(stop)!r} holds the special token {inside!r} beside text, which no reply does"
                raise RequestError(400, f"{message}; send the token alone", param="stop")
        if self._mask_id in found:
            raise RequestError(400, "stop: no reply holds the mask token", param="stop")
        return frozenset(found)

    def check_length(self, ids: Sequence[int], suffix: Sequence[int], param: str) -> None:
        """Raises RequestError for more than the limit, now that it is encoded."""
        if len(ids) + len(suffix) > self.max_length:
            self._refuse(f"{len(ids) + len(suffix):,} tokens" + (" with its suffix" if suffix else ""), param)

    def check_stop_ids(self, ids: Sequence[int]) -> frozenset[int]:
        """The ids themselves. Raises RequestError for one that is no token or the mask."""
        for token in ids:
            if not 0 <= token < self._vocab_size or token == self._mask_id:
                why = (
                    "is the mask, which no reply holds"
                    if token == self._mask_id
                    else f"lies outside the vocabulary of {self._vocab_size}"
                )
                message = f"stop_token_ids: id {shorten(str(token))} {why}"
                raise RequestError(400, message, param="stop_token_ids")
        return frozenset(ids)

    def _refuse_too_long(self, text: str, param: str) -> None:
        most = self._most(param) * self._token_bytes
        if len(text) > most or len(text.encode()) > most:
            self._refuse(f"{len(text):,} characters, more than so many tokens can spell", param)

    def _most(self, field: str) -> int:
        """Tokens that it may have."""
        return self.context_length if field in _OF_REPLIES else self.max_length

    def _refuse(self, given: str, param: str) -> NoReturn:
        subject, most = _SUBJECTS.get(param, "prompt"), self._most(param)
        limit = "the model's context length is" if most == self.context_length else "this endpoint takes"
        message = f"{limit} {most} tokens, but the {subject} has {given}"
        raise RequestError(400, message, param=param, code="context_length_exceeded")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
