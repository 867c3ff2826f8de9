"""The model's side of reading a prompt: text, conversations and token ids become ids that its canvas may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jinja2
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.tokenizer import encode_texts, render_chat
from pipelines.serving.errors import RequestError


class PromptEncoder:
    """Turns what the dialects (pipelines/serving/dialects) were sent into token ids. All errors are RequestErrors 400."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, vocab_size: int, mask_id: int) -> None:
        self._tokenizer, self._vocab_size, self._mask_id = tokenizer, vocab_size, mask_id

    def encode_text(self, text: str) -> list[int]:
        """The ids of plain text."""
        return encode_texts(self._tokenizer, [text])[0] if text else []

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of {"role", "content"} turns up to the open turn of the assistant.

        Raises RequestError when the tokenizer has no chat template or its template refuses the turns.
        """
        try:
            return render_chat(self._tokenizer, messages)
        except (UserError, jinja2.TemplateError) as error:
            raise RequestError(400, str(error), param="messages") from None

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids themselves. Raises RequestError for one that is no token, or the mask."""
        for token in ids:
            if not 0 <= token < self._vocab_size:
                message = f"prompt: token id {token} lies outside the vocabulary of {self._vocab_size}"
                raise RequestError(400, message, param="prompt")
            if token == self._mask_id:
                message = f"prompt: token id {token} is the mask; to fill a gap, send prompt and suffix"
                raise RequestError(400, message, param="prompt")
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
