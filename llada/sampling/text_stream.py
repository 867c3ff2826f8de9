"""Token ids in, showable text out, one token at a time: the part of a server that decides what may be shown already.

Held back: bytes of an unfinished UTF-8 character, and a tail that may still become a stop string. Special tokens
(masks, end markers, chat headers) never show.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError


class TextStream:
    """Incremental text of one reply: the pieces that `push` and `finish` return add up to the reply."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        """Raises UserError for an empty stop string, which would stop everything."""
        if "" in stop:
            raise UserError("a stop string must not be empty")
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._decoded = 0  # characters decoded so far
        self._maybe_stop = ""  # decoded, but may be the beginning of a stop string
        self.is_stopped = False  # a stop string was met; nothing may follow

    def push(self, token: int) -> str:
        """Add a token; returns the text that can be shown now, "" while it is held back."""
        self._ids.append(token)
        return self._show(self._decoder.step(self._tokenizer, token) or "")

    def finish(self) -> str:
        """No token follows: what was held back. Broken UTF-8 shows as U+FFFD, as it does in a whole decode."""
        if self.is_stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        shown = self._show(whole[self._decoded :])
        tail, self._maybe_stop = self._maybe_stop, ""
        return shown + ("" if self.is_stopped else tail)

    def _show(self, new: str) -> str:
        self._decoded += len(new)
        text = self._maybe_stop + new
        if stops_at := [at for at in (text.find(s) for s in self._stop) if at >= 0]:
            self.is_stopped, self._maybe_stop = True, ""
            return text[: min(stops_at)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._maybe_stop = text[len(text) - keep :]
        return text[: len(text) - keep]


def pieces(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int | None]) -> tuple[str | None, ...]:
    """The text that each token adds where it stands; None (a mask) adds None. A character of several tokens stands at the
    last of them, and what is no character is U+FFFD."""
    backend, found = tokenizer.backend_tokenizer, list[str | None]()
    for is_known, run in itertools.groupby(ids, lambda token: token is not None):
        known = [token for token in run if token is not None] if is_known else []
        if not is_known:
            found += [None for _ in run]
            continue
        decoder = DecodeStream(skip_special_tokens=True)
        texts = [decoder.step(backend, token) or "" for token in known]
        rest = len("".join(texts))
        texts[-1] += backend.decode(known, skip_special_tokens=True)[rest:]
        found += texts
    return tuple(found)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
