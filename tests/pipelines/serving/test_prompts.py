"""Text, conversations and token ids as a canvas may hold them."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

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


def test_what_cannot_fit_is_refused_before_it_is_encoded(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(PreTrainedTokenizerFast, "backend_tokenizer")  # nothing can be encoded
    text = "One, " * 2_000_000
    for encode, param in [
        (lambda: encoder.encode_text(text), "prompt"),
        (lambda: encoder.encode_text("é" * 1500), "prompt"),
        (lambda: encoder.encode_chat([{"role": "user", "content": text[:5000]}] * 3), "messages"),
        (lambda: encoder.check_ids([5] * 65), "prompt"),
    ]:
        with pytest.raises(RequestError, match="context length is 64 tokens, but the prompt has") as caught:
            encode()
        assert (caught.value.status, caught.value.param) == (400, param)
        assert caught.value.code == "context_length_exceeded"


def test_a_text_of_the_longest_tokens_fits() -> None:
    """The bound is on what tokens can spell, not on what they usually do."""
    tokenizer = train_tokenizer([" " * 64 + "x"] * 50, 320)
    encoder = PromptEncoder(
        tokenizer, vocab_size=len(tokenizer), mask_id=tokenizer.mask_token_id, max_length=64
    )
    longest = max((str(tokenizer.decode([i])) for i in range(6, len(tokenizer))), key=len)
    assert len(longest) > 8
    assert encoder.encode_text(longest * 64)


def test_stop_strings_that_are_special_tokens(encoder: PromptEncoder) -> None:
    assert encoder.find_stop_tokens(["Go", "<|eot_id|>", "<|startoftext|>"]) == {5, 2}
    assert encoder.find_stop_tokens(["<|eot_id", "<|unknown|>"]) == set()
    for stop, message in [
        ("One<|eot_id|>", "holds the special token '<|eot_id|>' beside text"),
        ("<|eot_id|>\n", "holds the special token '<|eot_id|>' beside text"),
        ("<|mdm_mask|>", "the mask token"),
    ]:
        with pytest.raises(RequestError) as caught:
            encoder.find_stop_tokens(["Go", stop])
        assert message in caught.value.message
        assert (caught.value.status, caught.value.param) == (400, "stop")


def test_an_error_of_ours_stays_one(encoder: PromptEncoder) -> None:
    with pytest.raises(TypeError):
        encoder.encode_chat([{"role": "user", "content": 7}])  # type: ignore[dict-item]
