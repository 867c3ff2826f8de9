"""What is asked without a reply: the tokenizer's side, over HTTP."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from llada.tokenizer import encode_texts, render_chat
from pipelines.serving.replica import Denoiser

Call = Callable[..., httpx.Response]
CHAT = [{"role": "user", "content": "How are you?"}]


def test_text_and_conversations_become_ids_and_back(post: Call, denoiser: Denoiser) -> None:
    tokenizer = denoiser.engine.tokenizer
    text = "Grüße 🙂 <|mdm_mask|>"
    answer = post("/tokenize", {"prompt": text}).json()
    assert answer["tokens"] == encode_texts(tokenizer, [text])[0]
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 2048)
    assert post("/detokenize", {"tokens": answer["tokens"], "model": "tiny"}).json() == {"prompt": text}
    assert post("/tokenize", {"messages": CHAT}).json()["tokens"] == render_chat(tokenizer, CHAT)
    assert post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    reply = post("/v1/completions", {"prompt": text, "max_tokens": 1}).json()
    assert reply["usage"]["prompt_tokens"] == answer["count"]


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("/tokenize", {}, "send either prompt or messages"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, "send either prompt or messages"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": True}, "unknown field 'add_special_tokens'"),
        ("/tokenize", {"messages": []}, "messages: list should have at least 1 item"),
        ("/tokenize", {"prompt": "x" * 10**6}, "context length is 2048 tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens: token id 1000000 lies outside the vocabulary"),
        ("/detokenize", {"tokens": [1]}, "tokens: token id 1 is the mask, which has no text"),
        ("/detokenize", {"tokens": "7"}, "tokens: input should be a valid list"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refuses_by_name(post: Call, path: str, body: dict[str, object], message: str) -> None:
    answer = post(path, body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert post(path, {**body, "model": "other"}).status_code in (400, 404)
