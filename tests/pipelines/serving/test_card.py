"""What /v1/models says of the model."""

from __future__ import annotations

from collections.abc import Callable

import httpx
from fastapi import FastAPI
from starlette.testclient import TestClient

from llada.sampling.config import SamplingConfig
from pipelines.serving.dialects.chat import ChatBody
from pipelines.serving.replica import Denoiser

Call = Callable[..., httpx.Response]


def test_the_card_has_the_models_facts_and_what_a_request_gets_that_does_not_choose(
    denoiser: Denoiser, application: Callable[..., FastAPI], call: Call
) -> None:
    (card,) = TestClient(application(denoiser)).get("/v1/models").json()["data"]
    config = denoiser.engine.model.config
    assert card["context_length"] == config.max_length
    assert card["num_parameters"] == sum(weight.numel() for weight in denoiser.engine.model.parameters())
    assert card["mask_token_id"] == denoiser.engine.mask_id
    defaults = card["defaults"]
    assert defaults["max_tokens"] == 8
    assert defaults["block_length"] == 32
    assert defaults.keys() <= ChatBody.model_fields.keys()
    SamplingConfig(**{name: value for name, value in defaults.items() if name != "max_tokens"})
    body = {"messages": [{"role": "user", "content": "How are you?"}]}
    plain, told = (
        call(denoiser, "POST", "/v1/chat/completions", sent).json()["choices"]
        for sent in (body, {**body, **defaults})
    )
    assert plain == told
