"""The bytes that a token stands for: a token may be a part of a character, so that its text alone says too little."""

from __future__ import annotations

import json
import re
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece's vocabularies name a single byte


class TokenBytes:
    """`table[id]` is the bytes of a token, b"" for a number without a token; of a special token, whose text does not show,
    its name."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._added = {number: token.content for number, token in added}
        self.special = frozenset(number for number, token in added if token.special)
        """The ids of special tokens."""
        decoder = self._tokenizer.decoder
        self._is_byte_level = decoder is not None and "ByteLevel" in json.dumps(
            json.loads(decoder.__getstate__())
        )
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        if (found := self._known.get(token)) is None:
            found = self._known[token] = self._spell(token)
        return found

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if self._is_byte_level:
            letters = _byte_letters()
            return bytes(letters[letter] for letter in name) if letters.keys() >= {*name} else name.encode()
        if single := _FALLBACK.fullmatch(name):
            return bytes([int(single.group(1), 16)])
        return name.replace("▁", " ").encode()


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """{letter: the byte that a byte-level vocabulary (GPT-2's) writes so}: printable bytes as Latin-1 has them, the others by
    the letters from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
