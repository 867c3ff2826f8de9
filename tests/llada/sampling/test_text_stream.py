"""Incremental text: the pieces add up to the decoded whole, and nothing shows too early."""

from __future__ import annotations

import random

from llada.sampling.text_stream import TextStream, pieces
from llada.tokenizer import encode_texts, train_tokenizer

TEXTS = ["The cat sat on the mat. The dog ran off.", "Grüße aus Köln, 你好 🙂!", "One, two, three. Go on!"]
TOKENIZER = train_tokenizer(TEXTS * 5, 300)


def ids(text: str) -> list[int]:
    return encode_texts(TOKENIZER, [text])[0]


def test_text_stream_adds_up_to_the_decoded_text() -> None:
    """Also for ids in random order: broken UTF-8, special tokens, ids without a token."""
    draw = random.Random(0)
    for _ in range(200):
        tokens = [draw.randrange(6, 305) if draw.random() < 0.95 else draw.randrange(6) for _ in range(60)]
        stream = TextStream(TOKENIZER, stop=("never",))
        text = "".join(stream.push(token) for token in tokens) + stream.finish()
        assert text == TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_text_stream_holds_back_what_may_become_a_stop() -> None:
    stream = TextStream(TOKENIZER, stop=("on the", "🙂!"))
    shown = [stream.push(token) for token in ids("sat on ice on top 🙂 on th")]
    assert not any(piece.endswith(("o", "on", "on ", "🙂")) for piece in shown)
    assert "".join(shown) + stream.finish() == "sat on ice on top 🙂 on th"
    assert not stream.is_stopped


def test_pieces_add_up_between_masks() -> None:
    draw = random.Random(1)
    for _ in range(100):
        tokens = [None if draw.random() < 0.2 else draw.randrange(len(TOKENIZER)) for _ in range(12)]
        runs: list[list[int]] = [[]]
        for token in tokens:
            runs.append([]) if token is None else runs[-1].append(token)
        found = pieces(TOKENIZER, tokens)
        assert [text is None for text in found] == [token is None for token in tokens]
        shown = "".join("\0" if text is None else text for text in found)
        assert shown == "\0".join(TOKENIZER.decode(run, skip_special_tokens=True) for run in runs)
    assert pieces(TOKENIZER, []) == ()
