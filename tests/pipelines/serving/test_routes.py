"""The HTTP application in front of a model in this process: what is refused, how it fails, and a dialect of one's own."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from safetensors.torch import load_file, save_file

from llada import __version__
from llada.sampling.config import SamplingConfig
from llada.sampling.events import Event, Started, Text
from pipelines.serving import routes
from pipelines.serving.access_log import RequestIds
from pipelines.serving.answer import Dialect
from pipelines.serving.backend import Health
from pipelines.serving.dialects.body import Prompt, SamplingBody
from pipelines.serving.dialects.writer import ReplyWriter
from pipelines.serving.prompts import PromptEncoder
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import DIALECTS, Access, build_api

Call = Callable[..., httpx.Response]
CHAT = [{"role": "user", "content": "How are you?"}]
CONTEXT = 2048
FAST = {"model": "tiny", "max_tokens": 20, "block_length": 8, "temperature": 1.0, "seed": 3}


JSON = {
    "type": "json_schema",
    "json_schema": {"schema": {"type": "object", "properties": {"a": {"type": "null"}}}},
}
REFUSED_EVERYWHERE = [
    ({"prompt_logprobs": 2}, "prompt_logprobs=2 is not supported"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids: id 1000000 lies outside the vocabulary of"),
    ({"stop_token_ids": [1]}, "stop_token_ids: id 1 is the mask"),
    ({"top_p": 1.5}, "top_p: input should be less than or equal to 1"),
    ({"top_k": -2}, "top_k: input should be greater than or equal to -1"),
    ({"presence_penalty": 0.5}, "presence_penalty=0.5 is not supported"),
    ({"frequency_penalty": -1}, "frequency_penalty=-1 is not supported"),
    ({"logit_bias": {"7": 3}}, "logit_bias"),
    ({"best_of": 3}, "best_of=3 is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format: json_object names no fields"),
    (
        {"response_format": {"type": "json_schema"}},
        "response_format: type json_schema goes with a json_schema",
    ),
    ({"response_format": JSON, "stop": "x"}, "stop does not go with a json_schema"),
    ({"response_format": JSON, "fixed": {"0": 7}}, "fixed does not go with a json_schema"),
    ({"response_format": JSON, "max_tokens": 3}, "tokens at the least, and max_tokens is 3"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"max_token": 5}, "unknown field 'max_token'; did you mean 'max_tokens'?"),
    ({"steps_": 5}, "unknown field 'steps_'; did you mean 'steps'?"),
    ({"max_tokens": "5"}, "max_tokens: input should be a valid integer"),
    ({"max_tokens": CONTEXT}, f"context length is {CONTEXT} tokens, but the prompt has"),
    ({"temperature": -1}, "temperature: input should be greater"),
    ({"temperature": float("nan")}, "temperature: input should be a finite number"),
    ({"n": 5}, "1 prompts × n=5 are more than the 4 choices allowed"),
    ({"stop": ""}, "stop: a stop string must not be empty"),
    ({"stop": ["a"] * 17}, "stop: list should have at most 16 items"),
    ({"remasking": "low_confidance"}, "did you mean 'low_confidence'?"),
    ({"remasking": "entropy"}, "needs the setting entropy_bound"),
    ({"remasking": 3}, "remasking: input should be a valid string"),
    ({"gen_length": 5}, "unknown field 'gen_length'"),
    ({"threshold": 0.9, "factor": 1.0}, "choose one rule"),
    ({"remasking": "random", "threshold": 0.9}, "need low_confidence"),
    ({"initial_length": 9, "max_tokens": 9}, "initial_length 9 means nothing to a reply of at most 9 tokens"),
    ({"initial_length": 4, "ignore_eos": True}, "initial_length needs an end of the text"),
    ({"steps": 10**9}, "steps: input should be less than or equal to"),
    ({"max_tokens": 65, "steps": 2}, "steps 2 is too few: 65 tokens are 3 blocks of block_length 32"),
    ({"max_tokens": 5, "block_length": 2, "steps": 2}, "5 tokens are 3 blocks of block_length 2"),
    ({"seed": 2**64}, "seed: input should be less than"),
    ({"stream_options": {"include_usage": True}}, "stream_options goes with stream=true"),
    ({"stream": True, "stream_options": {"include_usag": True}}, "did you mean 'include_usage'?"),
]
REFUSED_COMPLETIONS = [
    ({"suffix": ["a", 3, "b"], "max_tokens": None}, "a list of gaps needs max_tokens"),
    ({"suffix": ["a", 3, 4]}, "suffix: a list of gaps is texts and numbers of masks in turn"),
    ({"suffix": [3, "a"]}, "suffix: a list of gaps is texts and numbers of masks in turn"),
    ({"suffix": ["a", 0, "b"]}, "suffix: a gap has 1 to"),
    ({"suffix": []}, "suffix: a list of gaps has 1 to"),
    ({"suffix": ["a", 2], "fixed": {"0": 7}, "max_tokens": 3}, "fixed does not go with a list of gaps"),
    ({"suffix": ["a", 2000, "b"], "max_tokens": 100}, "and the suffix 2"),
    ({"max_tokens": 0}, "max_tokens=0 goes with echo=true"),
    ({"max_tokens": 0, "echo": True, "remasking": "none"}, "remasking"),
    ({"max_tokens": 0, "echo": True, "threshold": 0.5, "factor": 1.0}, "threshold"),
    ({"logprobs": True}, "logprobs: input should be a valid integer"),
    ({"logprobs": 21}, "logprobs: input should be less than or equal to 20"),
    ({"likelihood_from": 2, "echo": True}, "likelihood_from goes with echo=true and logprobs"),
    ({"likelihood_samples": 2, "logprobs": 0}, "likelihood_samples goes with echo=true and logprobs"),
    ({"likelihood_samples": 2, "logprobs": 1, "echo": True}, "send logprobs=0"),
    ({"logprobs": 0, "echo": True, "suffix": "x"}, "suffix: the likelihood of a prompt"),
    ({"logprobs": 0, "echo": True, "likelihood_from": 99}, "likelihood_from=99 lies behind the prompt of"),
    ({"prompt": []}, "prompt: must not be empty"),
    ({"prompt": 5}, "prompt: must be a string"),
    ({"prompt": ["a", 5]}, "prompt: must be a string"),
    ({"prompt": [10**6]}, "token id 1000000 lies outside the vocabulary of"),
    ({"prompt": [1]}, "token id 1 is the mask"),
    ({"prompt": "Go on! " * 2000}, f"context length is {CONTEXT} tokens, but the prompt has"),
    ({"prompt": [7] * 2000, "suffix": "Go on! " * 50}, "and the suffix"),
]
REFUSED_CHATS = [
    ({"max_tokens": 0}, "max_tokens: input should be greater than or equal to 1"),
    ({"logprobs": 3}, "logprobs: input should be a valid boolean"),
    ({"top_logprobs": 3}, "top_logprobs goes with logprobs=true"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs: input should be less than or equal to 20"),
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
    post: Call, path: str, base: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    response = post(path, {"model": "tiny", **base, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'"x"', b'{"model": "tiny", "prompt": "\\ud800"}']
)
def test_refuses_what_is_no_request(post: Call, body: bytes) -> None:
    response = post("/v1/completions", body)
    assert response.status_code == 400
    assert "body" in response.json()["error"]["message"]


def test_fields_that_ask_for_nothing_are_accepted(post: Call) -> None:
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
    response = post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] <= 5


def test_several_gaps_are_filled_at_once(post: Call, denoiser: Denoiser) -> None:
    """The text is what stands from the first gap to the last text, and each gap is told alone; whole and streamed."""
    body = {"prompt": "One,", "max_tokens": 3, "suffix": [" two,", 5, " three.", 2, " Go"], "n": 2}
    body |= {"temperature": 1.0, "seed": 4, "block_length": 4, "include_trace": True}
    whole = post("/v1/completions", body).json()
    for choice in whole["choices"]:
        first, second, third = choice["gaps"]
        assert choice["text"] == f"{first} two,{second} three.{third}"
        filled = [step is not None for step in choice["trace"]["steps"]]
        assert filled[:3] == [True, True, True]
        assert 3 + 5 <= sum(filled) <= 3 + 5 + 2
    streamed = post("/v1/completions", {**body, "stream": True, "n": 1}).text
    chunks = [json.loads(line[6:])["choices"][0] for line in streamed.splitlines() if line[:7] == "data: {"]
    assert "".join(chunk["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["gaps"] == whole["choices"][0]["gaps"]
    ends = {**body, "suffix": [" two"], "allowed": {"0": [denoiser.engine.eos_id]}}
    assert [choice["gaps"] for choice in post("/v1/completions", ends).json()["choices"]] == [[""], [""]]
    single = post("/v1/completions", {**body, "suffix": [" two"]}).json()["choices"][0]
    assert single["gaps"] == [single["text"]]
    assert single["text"] == post("/v1/completions", {**body, "suffix": " two"}).json()["choices"][0]["text"]


def test_unknown_routes_and_methods_are_errors_too(post: Call, call: Call, denoiser: Denoiser) -> None:
    response = post("/v1/embeddings", {})
    error = response.json()["error"]
    assert (response.status_code, error["message"]) == (404, "POST /v1/embeddings: Not Found")
    for method, path, allowed in [
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("DELETE", "/", {"GET", "HEAD"}),
        ("GET", "/v1/chat/completions", {"POST"}),
        ("OPTIONS", "/v1/completions/", {"POST"}),
    ]:
        response = call(denoiser, method, path)
        assert response.status_code == 405
        assert set(response.headers["allow"].split(", ")) == allowed
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("keys", [(), ("sk-good-key",)])
def test_unknown_routes_and_methods_are_counted_once(
    denoiser: Denoiser, backend: Callable[..., Any], keys: Sequence[str]
) -> None:
    api = build_api(backend(denoiser), "tiny", access=Access(keys=keys))
    asked = [("GET", "/v1/completions"), ("GET", "/v1/completions/"), ("POST", "/a"), ("POST", "/b")]

    async def ask() -> str:
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            for method, path in [*asked, ("DELETE", "/health")]:
                await client.request(method, path)
            return (await client.get("/metrics")).text

    metrics = asyncio.run(ask()).splitlines()
    assert sorted(line for line in metrics if line.startswith("llada_requests_total{")) == [
        'llada_requests_total{route="/v1/completions",status="405"} 2.0',
        'llada_requests_total{route="other",status="404"} 2.0',
        'llada_requests_total{route="other",status="405"} 1.0',
    ]


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_what_can_be_read_answers_head_and_a_trailing_slash(
    call: Call, denoiser: Denoiser, path: str
) -> None:
    assert call(denoiser, "HEAD", path).status_code == 200
    assert call(denoiser, "GET", path.rstrip("/") + "/").status_code == 200


def test_a_trailing_slash_keeps_the_body(post: Call) -> None:
    assert post("/v1/completions/", {**FAST, "prompt": "Go", "max_tokens": 2}).status_code == 200
    assert post("/v1/chat/completions/", {**FAST, "messages": CHAT, "max_tokens": 2}).status_code == 200


def test_names_are_repeated_in_part(call: Call, post: Call, denoiser: Denoiser) -> None:
    long = "x" * 10_000
    for response in (
        post("/v1/completions", {"prompt": "Go", "model": long}),
        call(denoiser, "GET", f"/v1/models/{long}"),
        call(denoiser, "GET", f"/{long}"),
        call(denoiser, "GET", "/v1/models/%ED%A0%80"),
        post("/v1/completions", {"prompt": "Go", "model": ""}),
    ):
        assert response.status_code == 404
        assert len(response.content) < 500


def test_answers_say_what_has_answered(post: Call, denoiser: Denoiser) -> None:
    body = {**FAST, "messages": CHAT, "max_tokens": 3}
    assert post("/v1/chat/completions", body).json()["system_fingerprint"] == denoiser.fingerprint
    stream = post("/v1/chat/completions", {**body, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {denoiser.fingerprint}


def test_a_fault_of_ours_has_openais_form_on_every_route() -> None:
    class Broken:
        async def stream(self, body: SamplingBody, ids: RequestIds) -> AsyncGenerator[Event, None]:
            yield Started(0)

        def health(self) -> Health:
            raise KeyError("secret")

    async def send() -> httpx.Response:
        api = build_api(Broken(), "tiny", access=Access(cors_origins=["https://a.site"]))
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/health", headers={"origin": "https://a.site", "x-request-id": "mine"})

    answer = asyncio.run(send())
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert (answer.headers["llada-version"], answer.headers["x-request-id"]) == (__version__, "mine")
    assert answer.headers["access-control-allow-origin"] == "https://a.site"
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"temperature": 3}, "temperature"),
        ({"max_token": 5}, "max_token"),
        ({"min_p": 1.5}, "min_p"),
        ({"remasking": "low_confidance"}, "remasking"),
        ({"threshold": 0.9, "factor": 1.0}, None),
        ({"n": 5}, "n"),
        ({"prompt": [10**6]}, "prompt"),
        ({"max_tokens": CONTEXT}, "prompt"),
    ],
    ids=str,
)
def test_a_refusal_names_the_field(post: Call, fields: dict[str, Any], param: str | None) -> None:
    assert post("/v1/completions", {"prompt": "Go", **fields}).json()["error"]["param"] == param


def test_a_refusal_uses_the_names_of_the_client(post: Call) -> None:
    """What is too long is called as the client has called it."""
    long, path = "Go on! " * 2000, "/v1/completions"
    for fields, param, message in [
        ({"messages": CHAT, "max_completion_tokens": CONTEXT}, "messages", "max_completion_tokens asks for"),
        ({"messages": CHAT, "max_tokens": CONTEXT}, "messages", "max_tokens asks for"),
        ({"messages": [{"role": "user", "content": long}]}, "messages", "the prompt has"),
        ({"messages": CHAT, "fixed": {"0": 10**6}}, "fixed", "token id 1000000"),
        ({"messages": CHAT, "fixed": {"99": 5}}, "fixed", "position 99"),
        ({"messages": CHAT, "fixed": {"0": True}}, "fixed.0", "fixed.0: input should be"),
        ({"messages": CHAT, "fixed": {"x": 5}}, "fixed.x", "fixed.x: input should be"),
        ({"messages": CHAT, "remasking": "random", "confidence_eos_eot_inf": True}, None, "means nothing"),
    ]:
        error = post("/v1/chat/completions", fields).json()["error"]
        assert (error["param"], message in error["message"]) == (param, True), error
    for fields, param, message in [
        ({"prompt": "Go", "suffix": long * 200}, "suffix", "the suffix has"),
        ({"prompt": ["Go"] * 5}, "prompt", "5 prompts × n=1"),
        ({"prompt": ["Go"] * 3, "n": 2}, "n", "3 prompts × n=2"),
    ]:
        error = post(path, fields).json()["error"]
        assert (error["param"], message in error["message"]) == (param, True), error


@pytest.mark.parametrize(
    "fields", [{}, {"stream": True}, {"temperature": 1.0, "remasking": "ancestral"}], ids=str
)
def test_weights_that_are_no_numbers_are_failures_and_no_replies(
    small_model: Path, tmp_path: Path, call: Call, fields: dict[str, Any]
) -> None:
    shutil.copytree(small_model, tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    for tensor in weights.values():
        tensor.fill_(float("nan"))
    save_file(weights, tmp_path / "nan" / "model.safetensors")
    denoiser = Denoiser(str(tmp_path / "nan"), SamplingConfig(gen_length=8, steps=None, block_length=32))
    for _ in range(3):
        assert call(denoiser, "GET", "/health").status_code == 200
        answer = call(denoiser, "POST", "/v1/completions", {"prompt": "Go", **fields})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    health = call(denoiser, "GET", "/health")
    assert (health.status_code, health.json()["reason"]) == (503, "the last 3 requests failed in the network")
    denoiser.close()


# --- A dialect of one's own: a body and a writer, and a row of DIALECTS ------------------------------------------------


class ToyBody(SamplingBody):
    """The beginning of OpenAI's newer protocol."""

    prompt_field: ClassVar[str] = "input"
    input: str
    instructions: str = "Be brief."
    max_output_tokens: int | None = None

    @property
    def limit_field(self) -> str:
        return "max_output_tokens"

    def prompts(self, encoder: PromptEncoder) -> list[Prompt]:
        turns = [("system", self.instructions), ("user", self.input)]
        return [Prompt(encoder.encode_chat([{"role": role, "content": text} for role, text in turns]))]


class ToyWriter(ReplyWriter):
    """Named events, and no [DONE]."""

    id_prefix = "resp"
    whole_object = chunk_object = "response"
    end_of_stream = ""

    def message(self, text: str) -> dict[str, Any]:
        return {"type": "message", "content": [{"type": "output_text", "text": text}]}

    def delta(self, text: str) -> dict[str, Any]:
        return {"type": "response.output_text.delta", "delta": text}

    def no_delta(self) -> dict[str, Any]:
        return {"type": "response.completed"}

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        self.add(event)
        return [self.delta(event.text) if isinstance(event, Text) else self.no_delta()]

    def frame(self, chunk: dict[str, Any]) -> str:
        return f"event: {chunk['type']}\n{super().frame(chunk)}"


def test_a_dialect_is_a_body_a_writer_and_a_row(post: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Dialect("/v1/toys", ToyBody, ToyWriter)
    monkeypatch.setattr(routes, "DIALECTS", (*DIALECTS, row))
    body = {"input": "How are you?", "temperature": 1.0, "seed": 1}
    whole = post(row.path, body).json()
    assert whole["object"] == "response"
    (part,) = whole["choices"][0]["content"]
    *deltas, last = post(row.path, {**body, "stream": True}).text.strip().split("\n\n")
    assert last.startswith("event: response.completed\ndata: ")
    texts = [json.loads(delta.split("data: ")[1])["delta"] for delta in deltas]
    assert "".join(texts) == part["text"] != ""
    refused = post(row.path, {**body, "max_output_token": 3})
    assert refused.status_code == 400
    assert "did you mean 'max_output_tokens'?" in refused.json()["error"]["message"]
    assert post(row.path, {**body, "threshold": 2}).json()["error"]["param"] == "threshold"
    assert post(row.path, {**body, "max_output_tokens": 3}).json()["usage"]["completion_tokens"] <= 3
    too_long = post(row.path, {**body, "max_output_tokens": CONTEXT}).json()["error"]
    assert too_long["param"] == "input"
    assert f"and max_output_tokens asks for {CONTEXT} more" in too_long["message"]
