"""One reply as it grows on its canvas: which of its tokens can be read already, and whether it has ended."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llada.sampling.events import FinishReason
from llada.sampling.text_stream import TextStream


class Reply:
    """The `length` columns of a canvas behind its prompt, read from left to right up to the first mask."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        start: int,
        length: int,
        mask_id: int,
        end_ids: frozenset[int],
        stop: Sequence[str] = (),
        fill_id: int | None = None,
    ) -> None:
        """`fill_id`: what becomes of the masks behind an end token; None: that end token."""
        self._tokenizer, self._mask_id, self.end_ids, self._fill_id = tokenizer, mask_id, end_ids, fill_id
        self._columns = slice(start, start + length)
        self._length = length
        self._text = TextStream(tokenizer, stop)
        self.ids: list[int] = []
        """As they were read last, masks included."""
        self.num_committed = 0
        """Tokens that were turned into text."""
        self.reason: FinishReason | None = None
        """Why the reply has ended; None while it has not."""

    def read(self, tokens: Tensor, final_until: int | None = None) -> str:
        """The text that has become readable in the row `tokens` (L,), whose masks behind an end token are filled. From the
        column `final_until` on, tokens may change yet; None: none may."""
        self.ids = self._close(tokens[self._columns])
        shown = ""
        final = self._length if final_until is None else final_until - self._columns.start
        while self.reason is None and self.num_committed < min(self._length, final):
            token = self.ids[self.num_committed]
            if token == self._mask_id:
                break
            if token in self.end_ids:
                self.reason = "stop"
                break
            self.num_committed += 1
            shown += self._text.push(token)
            if self._text.is_stopped:
                self.reason = "stop"
        if self.reason is None and self.num_committed == self._length:
            self.reason = "length"
        if self.reason is not None:
            shown += self._text.finish()
            if self._text.is_stopped:  # the last character of a stop string may have been held back
                self.reason = "stop"
        return shown

    @property
    def has_end(self) -> bool:
        """Whether an end token has ended it; it stands behind the tokens that were turned into text."""
        place = self.num_committed
        return self.reason == "stop" and not self._text.is_stopped and place < len(self.ids)

    def draw(self) -> list[int | None]:
        """The ids of the reply, as it was read last, up to its end token; None is a mask."""
        known = itertools.takewhile(lambda token: token not in self.end_ids, self.ids)
        return [None if token == self._mask_id else token for token in known]

    def _close(self, reply: Tensor) -> list[int]:
        """The reply's ids. Behind its first end token every mask is filled, as the loop itself does it behind EOS:
        nothing there will be read, so no forward may be spent on it."""
        ids: list[int] = reply.tolist()
        first = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
        if first is None or self._mask_id not in ids[first:]:
            return ids
        rest = reply[first:]
        rest[rest == self._mask_id] = ids[first] if self._fill_id is None else self._fill_id
        return reply.tolist()
