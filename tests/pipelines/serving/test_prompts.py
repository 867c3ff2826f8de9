"""Text, conversations and token ids as a canvas may hold them."""

from __future__ import annotations

import pytest

from llada.tokenizer import train_tokenizer
from pipelines.serving.errors import RequestError
from pipelines.serving.prompts import PromptEncoder


@pytest.fixture
def encoder() -> PromptEncoder:
    tokenizer = train_tokenizer(["One, two, three."] * 5, 270)
    return PromptEncoder(tokenizer, vocab_size=len(tokenizer), mask_id=tokenizer.mask_token_id, max_length=64)


def test_text_is_only_text(encoder: PromptEncoder) -> None:
    ids = encoder.encode_text("One <|mdm_mask|>")
    assert encoder.check_ids(ids) == ids  # no mask among them
    assert encoder.decode(ids) == "One <|mdm_mask|>"
    assert encoder.encode_text("") == []


def test_a_conversation_ends_in_the_open_turn_of_the_assistant(encoder: PromptEncoder) -> None:
    ids = encoder.encode_chat([{"role": "user", "content": "One"}])
    assert encoder.decode(ids).endswith("assistant\n\n")


def test_ids_that_are_no_text_are_refused(encoder: PromptEncoder) -> None:
    for ids, message in [([5, 10**6], "lies outside"), ([-1], "lies outside"), ([1], "is the mask")]:
        with pytest.raises(RequestError, match=message) as caught:
            encoder.check_ids(ids)
        assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize(
    "template, message",
    [("{{ raise_exception('system turns first') }}", "system turns first"), (None, "no chat template")],
)
def test_what_the_template_refuses_is_the_clients_fault(template: str | None, message: str) -> None:
    tokenizer = train_tokenizer(["One, two, three."] * 5, 270)
    tokenizer.chat_template = template
    encoder = PromptEncoder(
        tokenizer, vocab_size=len(tokenizer), mask_id=tokenizer.mask_token_id, max_length=64
    )
    with pytest.raises(RequestError, match=message) as caught:
        encoder.encode_chat([{"role": "user", "content": "One"}])
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_an_error_of_ours_stays_one(encoder: PromptEncoder) -> None:
    with pytest.raises(TypeError):
        encoder.encode_chat([{"role": "user", "content": 7}])  # type: ignore[dict-item]
