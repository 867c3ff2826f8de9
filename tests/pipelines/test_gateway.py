"""The HTTP application and the model's side of it in one process, without Ray: what is refused, and how it fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llada.errors import UserError
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.tokenizer import save_tokenizer, train_tokenizer
from pipelines.serve import parse_args
from pipelines.serving.openai_api import RequestError
from pipelines.serving.replica import Denoiser, SamplingDefaults
from pipelines.serving.routes import build_api

CHAT = [{"role": "user", "content": "How are you?"}]
CONTEXT = 2048
FAST = {"model": "tiny", "max_tokens": 20, "block_length": 8, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a random network."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(["One, two, three. Go on! Grüße 🙂"] * 5, 300)
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    config = ModelConfig(
        len(tokenizer), 32, 2, 2, 64, max_length=CONTEXT, mask_token_id=mask, eos_token_id=eos
    )
    model = Transformer(config)
    model.init_weights(0)
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    return folder


class Local:
    """The Denoiser in this process as the gateway's backend."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.stream = denoiser, denoiser.stream

    async def unhealthy(self) -> str | None:
        try:
            self.denoiser.check_health()
        except RuntimeError as error:
            return str(error)
        return None


@pytest.fixture(scope="module")
def denoiser(random_model: Path) -> Iterator[Denoiser]:
    denoiser = Denoiser(str(random_model), SamplingDefaults(max_tokens=8), max_choices=4)
    yield denoiser
    denoiser.close()


def call(denoiser: Denoiser, method: str, path: str, body: Any = None) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(build_api(Local(denoiser), "tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.request(method, path, content=content)

    return asyncio.run(send())


def post(denoiser: Denoiser, path: str, body: Any) -> httpx.Response:
    return call(denoiser, "POST", path, body)


REFUSED_EVERYWHERE = [
    ({"logprobs": True}, "logprobs=true is not supported"),
    ({"top_p": 0.9}, "top_p=0.9 is not supported: use temperature"),
    ({"top_k": 40}, "top_k=40 is not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty=0.5 is not supported"),
    ({"frequency_penalty": -1}, "frequency_penalty=-1 is not supported"),
    ({"logit_bias": {"7": 3}}, "logit_bias"),
    ({"best_of": 3}, "best_of=3 is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"max_token": 5}, "unknown field 'max_token'; did you mean 'max_tokens'?"),
    ({"steps_": 5}, "unknown field 'steps_'; did you mean 'steps'?"),
    ({"max_tokens": 0}, "max_tokens: input should be greater than or equal to 1"),
    ({"max_tokens": "5"}, "max_tokens: input should be a valid integer"),
    ({"max_tokens": CONTEXT}, f"context length is {CONTEXT} tokens, but the prompt has"),
    ({"temperature": -1}, "temperature: input should be greater"),
    ({"temperature": float("nan")}, "temperature: input should be a finite number"),
    ({"n": 5}, "1 prompts × n=5 are more than the 4 choices allowed"),
    ({"stop": ""}, "stop: a stop string must not be empty"),
    ({"stop": ["a"] * 17}, "stop: list should have at most 16 items"),
    ({"remasking": "entropy"}, "remasking: input should be 'low_confidence', 'random' or 'ancestral'"),
    ({"threshold": 0.9, "factor": 1.0}, "choose one rule"),
    ({"remasking": "random", "threshold": 0.9}, "need low_confidence"),
    ({"steps": 10**9}, "steps: input should be less than or equal to"),
    ({"seed": 2**64}, "seed: input should be less than"),
    ({"stream_options": {"include_usage": True}}, "stream_options goes with stream=true"),
    ({"stream": True, "stream_options": {"include_usag": True}}, "did you mean 'include_usage'?"),
]
REFUSED_COMPLETIONS = [
    ({"prompt": []}, "prompt: must not be empty"),
    ({"prompt": 5}, "prompt: must be a string"),
    ({"prompt": ["a", 5]}, "prompt: must be a string"),
    ({"prompt": [10**6]}, "token id 1000000 lies outside the vocabulary of"),
    ({"prompt": [1]}, "token id 1 is the mask"),
    ({"prompt": "Go on! " * 2000}, f"context length is {CONTEXT} tokens, but the prompt has"),
    ({"prompt": [7] * 2000, "suffix": "Go on! " * 50}, "and the suffix"),
]
REFUSED_CHATS = [
    ({"messages": []}, "messages: list should have at least 1 item"),
    ({"messages": "Hello"}, "messages: input should be a valid list"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content: field required"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "the model reads text only"),
    ({"messages": [{"role": "user", "contents": "x"}]}, "did you mean 'content'?"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
    ({"suffix": "x"}, "unknown field 'suffix'"),
]


@pytest.mark.parametrize(
    "path, base, fields, message",
    [("/v1/completions", {"prompt": "Go"}, f, m) for f, m in REFUSED_EVERYWHERE + REFUSED_COMPLETIONS]
    + [("/v1/chat/completions", {"messages": CHAT}, f, m) for f, m in REFUSED_EVERYWHERE + REFUSED_CHATS],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refuses_by_name(
    denoiser: Denoiser, path: str, base: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    response = post(denoiser, path, {"model": "tiny", **base, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'"x"', b'{"model": "tiny", "prompt": "\\ud800"}']
)
def test_refuses_what_is_no_request(denoiser: Denoiser, body: bytes) -> None:
    response = post(denoiser, "/v1/completions", body)
    assert response.status_code == 400
    assert "body" in response.json()["error"]["message"]


def test_fields_that_ask_for_nothing_are_accepted(denoiser: Denoiser) -> None:
    """What OpenAI's client and frameworks send by default, and a reply that comes back as history."""
    answer = {"role": "assistant", "content": "Well.", "refusal": None, "tool_calls": None, "annotations": []}
    parts = {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "you?"}]}
    body = {
        "model": "tiny",
        "messages": [{"role": "developer", "content": "Be brief."}, *CHAT, answer, parts],
        "top_p": 1.0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "tools": None,
        "response_format": {"type": "text"},
        "n": None,
        "stop": None,
        "user": "someone",
        "max_completion_tokens": 5,
    }
    response = post(denoiser, "/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] <= 5


def test_the_default_length_shrinks_where_the_context_ends(denoiser: Denoiser) -> None:
    for prompt, expected in [([7] * 10, 8), ([7] * (CONTEXT - 3), 3)]:
        body = {"model": "tiny", "prompt": prompt, "temperature": 1.0, "seed": 0}
        assert post(denoiser, "/v1/completions", body).json()["usage"]["completion_tokens"] == expected


def test_unknown_routes_and_methods_are_errors_too(denoiser: Denoiser) -> None:
    response = post(denoiser, "/v1/embeddings", {})
    error = response.json()["error"]
    assert (response.status_code, error["message"]) == (404, "POST /v1/embeddings: Not Found")
    assert post(denoiser, "/v1/models", {}).status_code == 405


def test_a_failure_before_the_first_text_is_a_status_and_later_an_event(random_model: Path) -> None:
    """Also for a stream: the client gets 500 instead of a stream that breaks off, as long as there is none."""
    denoiser = Denoiser(str(random_model), SamplingDefaults())
    network = denoiser.engine.model

    class Breaking:
        config = network.config
        forwards = 0
        last = 0  # forwards that go well

        def __call__(self, tokens: Any, **inputs: Any) -> Any:
            self.forwards += 1
            if self.forwards > self.last:
                raise RuntimeError("out of memory")
            return network(tokens, **inputs)

    breaking = denoiser.engine.model = Breaking()
    body = {**FAST, "prompt": "Go", "stream": True, "block_length": 4}
    early = post(denoiser, "/v1/completions", body)
    breaking.forwards, breaking.last = 0, 10
    late = post(denoiser, "/v1/completions", body)
    assert early.status_code == 500
    assert early.json()["error"]["type"] == "server_error"
    assert "memory" not in early.text  # what went wrong inside is for the log
    assert late.status_code == 200
    *_, error, done, _ = late.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    assert done == "data: [DONE]"
    assert call(denoiser, "GET", "/health").status_code == 200  # two failures are no broken machine
    breaking.forwards, breaking.last = 0, 0
    post(denoiser, "/v1/completions", body)
    health = call(denoiser, "GET", "/health")
    assert health.status_code == 503
    assert "last 3 requests failed" in health.json()["reason"]
    denoiser.close()


def test_request_rules_replace_default_rules() -> None:
    defaults = SamplingDefaults(threshold=0.9, block_length=16)
    assert defaults.config({}, 20).threshold == 0.9
    assert defaults.config({"factor": 1.0}, 20).threshold is None
    assert defaults.config({"remasking": "random"}, 20).threshold is None
    assert defaults.config({}, 20).steps == 32  # a token a step, also in a short last block
    with pytest.raises(ValueError, match="choose one rule"):
        SamplingDefaults(threshold=0.9, factor=1.0)


def test_request_errors_have_openais_form() -> None:
    body = RequestError(429, "later", code="queue_full", retry_after_s=5).body()
    assert body == {
        "error": {"message": "later", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model": "m", "max_replica": 3}, "unknown field 'max_replica'; did you mean 'max_replicas'?"),
        ({"model": "m", "port": "8000"}, "port: input should be a valid integer"),
        ({"model": "m", "min_replicas": 3, "max_replicas": 2}, "max_replicas 2 is below min_replicas 3"),
        ({"model": "m", "max_queued_requests": 0}, "-1 or at least 1"),
        ({"model": "m", "target_ongoing_requests": 9.0}, "at most max_ongoing_requests 8"),
        ({"model": "m", "sampling": {"step": 3}}, "unknown field 'sampling.step'; did you mean 'steps'?"),
        ({"model": "m", "sampling": {"steps": -3}}, "steps must be at least 1"),
        ({}, "model: field required"),
    ],
)
def test_wrong_arguments_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse_args(values)
