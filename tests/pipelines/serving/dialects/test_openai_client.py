"""The `openai` client against the application: what it sends is understood, and what it reads has its types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel

openai = pytest.importorskip("openai", reason="needs the package openai")
CHAT: list[dict[str, str]] = [{"role": "user", "content": "How are you?"}]
OURS = {"block_length": 4, "seed": 3}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_log_probabilities(client: Any) -> None:
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 6, "temperature": 1.0, "extra_body": OURS}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    content = whole.logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == whole.message.content
    assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in content)
    assert all(len(token.top_logprobs) == 3 for token in content)
    chunks = list(client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True))
    streamed = [token for chunk in chunks if (found := chunk.choices[0].logprobs) for token in found.content]
    assert streamed == content
    completion = client.completions.create(
        model="tiny", prompt="One", max_tokens=0, echo=True, logprobs=2
    ).choices[0]
    assert completion.text == "".join(completion.logprobs.tokens) == "One"
    assert len(completion.logprobs.top_logprobs[0]) == 2


def test_a_client_that_knows_no_drafts_reads_the_text(client: Any) -> None:
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "temperature": 1.0, "extra_body": OURS}
    options = {"include_drafts": True, "include_usage": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == client.chat.completions.create(**asked).choices[0].message.content
    assert any(getattr(chunk, "draft", None) for chunk in chunks)
    assert chunks[-1].usage.total_tokens > 0


class Home(BaseModel):
    city: str


class Person(BaseModel):
    name: str
    age: int
    mood: Literal["good", "bad"] | None
    home: Home


def test_a_model_of_pydantic_is_parsed(client: Any) -> None:
    """As the client makes the schema: with references, strict, and no further properties."""
    parsed = client.chat.completions.parse(
        model="tiny", messages=CHAT, max_tokens=120, temperature=1.0, response_format=Person, extra_body=OURS
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
    response = client.responses.parse(
        model="tiny", input="Who?", max_output_tokens=120, text_format=Person, extra_body=OURS
    )
    assert isinstance(response.output_parsed, Person)


def test_responses(client: Any) -> None:
    asked = {"model": "tiny", "input": "How are you?", "instructions": "Be brief.", "extra_body": OURS}
    response = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response() if response.status == "completed" else None
    assert text == response.output_text
    assert final is None or final.output_text == text
    with pytest.raises(openai.BadRequestError, match="nothing is kept"):
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")


def test_what_has_answered(client: Any) -> None:
    raw = client.completions.with_raw_response.create(model="tiny", prompt="One", max_tokens=2)
    assert raw.headers["llada-version"]
    assert raw.headers["x-request-id"]
    assert raw.headers["system-fingerprint"] == raw.parse().system_fingerprint
    assert client.models.retrieve("tiny").id == "tiny"
