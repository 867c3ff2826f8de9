"""The HTTP application and the model's side of it in one process, without Ray."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.config import SamplingConfig
from llada.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from pipelines.serving.access_log import access_log
from pipelines.serving.backend import Health
from pipelines.serving.card import model_facts
from pipelines.serving.limits import RequestLimits
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import Access, build_api

CONTEXT = 2048


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a random network with a context of 2048 tokens."""
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


@pytest.fixture(scope="session")
def denoiser(small_model: Path) -> Iterator[Denoiser]:
    """The model's side: replies of 8 tokens where nothing is said."""
    sampling = SamplingConfig(gen_length=8, steps=None, block_length=32)
    denoiser = Denoiser(str(small_model), sampling)
    yield denoiser
    denoiser.close()


@pytest.fixture(scope="session")
def short_denoiser(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Denoiser]:
    """A smaller network with a context of 64 tokens, so that no request takes long."""
    folder = tmp_path_factory.mktemp("models") / "short"
    tokenizer = load_tokenizer(small_model)
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = Transformer(ModelConfig(len(tokenizer), 16, 1, 2, 32, max_length=64, **ids))
    model.init_weights(0)
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    denoiser = Denoiser(str(folder), SamplingConfig(gen_length=8, block_length=8))
    yield denoiser
    denoiser.close()


@pytest.fixture(scope="session")
def short_api(short_denoiser: Denoiser) -> FastAPI:
    """The application in front of it."""
    return build_api(Local(short_denoiser), "tiny", RequestLimits(choices=4))


class Local:
    """The Denoiser in this process as the application's backend."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.stream = denoiser, denoiser.stream

    def health(self) -> Health:
        try:
            self.denoiser.check_health()
        except RuntimeError as error:
            return Health("unavailable", str(error))
        return Health("ok")


@pytest.fixture(scope="session")
def backend() -> Callable[[Denoiser], Local]:
    """backend(denoiser) is what the application asks."""
    return Local


class Lines(logging.Handler):
    """Lines of the access log, read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.read.append(json.loads(record.getMessage()))


@pytest.fixture
def access_lines() -> Iterator[list[dict[str, Any]]]:
    """What is written to the access log during the test."""
    lines, level = Lines(), access_log.level
    access_log.addHandler(lines)
    access_log.setLevel(logging.INFO)
    yield lines.read
    access_log.removeHandler(lines)
    access_log.setLevel(level)


Call = Callable[..., httpx.Response]


@pytest.fixture(scope="session")
def application() -> Callable[..., FastAPI]:
    """The HTTP application in front of a Denoiser."""

    def application(denoiser: Denoiser, keys: Sequence[str] = ()) -> FastAPI:
        facts = model_facts(denoiser.engine.model.config, denoiser.sampling)
        return build_api(Local(denoiser), "tiny", access=Access(keys=keys), facts=facts)

    return application


@pytest.fixture(scope="session")
def call() -> Call:
    """call(denoiser, method, path, body) is a request to the application; `body` as JSON unless it is bytes."""

    def call(
        denoiser: Denoiser, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(build_api(Local(denoiser), "tiny", RequestLimits(choices=4)))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                return await client.request(method, path, content=content, headers=headers)

        return asyncio.run(send())

    return call


@pytest.fixture(scope="session")
def post(call: Call, denoiser: Denoiser) -> Call:
    """post(path, body) to the application in front of `denoiser`."""
    return lambda path, body: call(denoiser, "POST", path, body)


@pytest.fixture(scope="session")
def url(denoiser: Denoiser, served: Callable[[FastAPI], AbstractContextManager[str]]) -> Iterator[str]:
    """Of the application behind a real server."""
    with served(build_api(Local(denoiser), "tiny", RequestLimits(choices=4))) as address:
        yield address
