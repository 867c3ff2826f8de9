"""What is asked without a reply: the tokenizer's side, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from llada.sampling.config import SamplingConfig
from llada.tokenizer import encode_texts, render_chat
from pipelines.serving.dialects.calls import AnyBody, DetokenizeBody, TokenizeBody
from pipelines.serving.errors import RequestError
from pipelines.serving.metrics import GatewayMetrics
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


def test_a_limit_of_prompts_is_none_of_what_a_reply_may_hold(small_model: Path) -> None:
    sampling = SamplingConfig(gen_length=8, steps=None)
    encoder = (limited := Denoiser(str(small_model), sampling, max_prompt_tokens=4)).encoder
    limited.close()
    assert DetokenizeBody(tokens=[7] * 9).answer(encoder)["prompt"]
    assert TokenizeBody(prompt="Go").answer(encoder)["max_model_len"] == 2048
    with pytest.raises(RequestError, match="this endpoint takes 4 tokens, but the prompt has 5 tokens"):
        encoder.check_ids([7] * 5)
    with pytest.raises(RequestError, match="context length is 2048 tokens, but the list of ids has 2,049"):
        DetokenizeBody(tokens=[7] * 2049).answer(encoder)


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
        ("/detokenize", {"tokens": [5] * 3000}, "is 2048 tokens, but the list of ids has 3,000 tokens"),
        ("/detokenize", {"tokens": "7"}, "tokens: input should be a valid list"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refuses_by_name(post: Call, path: str, body: dict[str, object], message: str) -> None:
    answer = post(path, body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert post(path, {**body, "model": "other"}).status_code in (400, 404)


def test_no_version_of_a_model_is_measured_by_them(denoiser: Denoiser) -> None:
    metrics = GatewayMetrics()

    async def ask(body: AnyBody) -> None:
        with metrics.track("/tokenize") as track:
            async for event in denoiser.stream(body):
                track.see(event)
            track.status = 200

    for body in (TokenizeBody(prompt="x"), DetokenizeBody(tokens=[5])):
        asyncio.run(ask(body))
    text = metrics.render().decode()
    assert 'llada_requests_total{route="/tokenize",status="200"} 2.0' in text
    assert "llada_version_requests_total{" not in text
    assert "llada_version_seconds_count{" not in text
