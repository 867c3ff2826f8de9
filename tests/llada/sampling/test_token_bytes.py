"""A token's bytes, of every kind of vocabulary."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llada.sampling.token_bytes import TokenBytes
from llada.tokenizer import encode_texts, train_tokenizer

TEXT = "Grüße, 你好 🙂!\n\t\x7f\xa0\xad end"


def test_the_bytes_of_a_text_are_those_of_its_tokens() -> None:
    tokenizer = train_tokenizer([TEXT] * 3, 300)
    spell = TokenBytes(tokenizer)
    ids = encode_texts(tokenizer, [TEXT])[0]
    assert b"".join(spell[token] for token in ids) == TEXT.encode()
    assert {spell[token] for token in range(6, 262)} == {bytes([byte]) for byte in range(256)}
    assert spell[tokenizer.mask_token_id] == b"<|mdm_mask|>"
    assert spell[10**6] == b""


@pytest.mark.parametrize("token, spelled", [("▁go", b" go"), ("<0xE2>", b"\xe2"), ("ü", "ü".encode())])
def test_of_a_vocabulary_that_marks_words(token: str, spelled: bytes) -> None:
    backend = Tokenizer(models.BPE(vocab={token: 0}, merges=[], byte_fallback=True))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend))[0] == spelled
