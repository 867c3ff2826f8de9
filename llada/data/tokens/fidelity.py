"""Whether a tokenizer knows the text that it is given: what is left of a sample when its ids are read again.

Writing everything in lower case, without accents or with other spaces is a tokenizer's good right. Letters that it does
not know are lost, and a model learns holes in their place.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter
from typing import TYPE_CHECKING

from llada.tokenizer import encode_texts, unknown_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLE_CHARS = 2000
"""Of a document."""
_FIRST = 32  # documents of a unit that are all in the sample; of those behind them, by their hash, one in
_ONE_IN = 64


def is_sampled(number: int, text: str) -> bool:
    """Whether the document of that number, from 0 in its unit, is in the sample."""
    if number < _FIRST:
        return True
    return zlib.crc32(text[:SAMPLE_CHARS].encode("utf-8", "surrogatepass")) % _ONE_IN == 0


def compare(tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, int]:
    """What of the beginning of a text its tokens hold, as figures to be added up:

    documents             1
    empty_documents       1 when nothing is left
    altered_documents     1 when the text is not the same, be it only in its case or spaces
    lossy_documents       1 when more than that is different
    characters            of the text, without spaces and accents
    lost_characters       those of them that are not there any more (at least: their order is not looked at)
    tokens, unknown_tokens
    """
    text = text[:SAMPLE_CHARS]
    ids = encode_texts(tokenizer, [text])[0]
    unknown = unknown_token_id(tokenizer)
    known = [number for number in ids if number != unknown]
    again = str(tokenizer.decode(known)) if known else ""
    before, after = _letters(text), _letters(again)
    return {
        "documents": 1,
        "empty_documents": int(not known),
        "altered_documents": int(again != text),
        "lossy_documents": int(before != after),
        "characters": len(before),
        "lost_characters": (Counter(before) - Counter(after)).total(),
        "tokens": len(ids),
        "unknown_tokens": len(ids) - len(known),
    }


def _letters(text: str) -> str:
    """A text without what tokenizers may change: case, accents, spaces and compatibility forms."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    kinds = ((sign, unicodedata.category(sign)) for sign in plain)
    return "".join(sign for sign, kind in kinds if kind != "Mn" and kind[0] not in "ZC")
