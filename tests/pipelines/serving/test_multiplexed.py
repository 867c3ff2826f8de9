"""Several models on one replica: over the HTTP application in one process, and on a real Ray Serve."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llada.errors import UserError
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.config import SamplingConfig
from llada.tokenizer import load_tokenizer, save_tokenizer
from pipelines.serve import serve
from pipelines.serving import multiplexed
from pipelines.serving.access_log import RequestIds
from pipelines.serving.args import ServeArgs
from pipelines.serving.backend import Health
from pipelines.serving.dialects.calls import AnyBody
from pipelines.serving.events import ReplicaEvent
from pipelines.serving.multiplexed import MultiplexedDenoiser, Offered
from pipelines.serving.routes import build_api
from pipelines.serving.scaling import MEAN_REQUEST, REPLIES, USUAL_REQUEST, WORK
from pipelines.stage.cluster import ClusterConfig

FAST = {"prompt": "Go", "max_tokens": 6, "temperature": 1.0, "seed": 3, "ignore_eos": True}
SAMPLING = SamplingConfig(gen_length=8, block_length=8)


def make_model(folder: Path, like: Path, seed: int, width: int = 32) -> Path:
    tokenizer = load_tokenizer(like)
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = Transformer(ModelConfig(len(tokenizer), width, 2, 2, 2 * width, max_length=512, **ids))
    model.init_weights(seed)
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def folders(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models with different weights."""
    room = tmp_path_factory.mktemp("models")
    return {name: make_model(room / name, small_model, seed) for seed, name in enumerate("abc", start=1)}


class Local:
    """A replica in this process."""

    def __init__(self, replica: MultiplexedDenoiser) -> None:
        self._replica = replica

    async def stream(self, body: AnyBody, ids: RequestIds) -> AsyncGenerator[ReplicaEvent, None]:
        async for events in self._replica.batches(body, ids):
            for event in events:
                yield event

    def health(self) -> Health:
        return Health("ok")


@pytest.fixture
def replica(folders: dict[str, Path]) -> Iterator[MultiplexedDenoiser]:
    offered = {name: Offered(str(folder), f"{name}-1") for name, folder in folders.items()}
    replica = MultiplexedDenoiser(offered, 2, SAMPLING, max_concurrent=4)
    yield replica
    replica.close()


def ask_all(replica: MultiplexedDenoiser, *bodies: dict[str, Any]) -> tuple[list[httpx.Response], str]:
    """Answers to requests that come together, and /metrics behind them."""

    async def send() -> tuple[list[httpx.Response], str]:
        more: dict[str, dict[str, Any]] = {"b": {}, "c": {}}
        transport = httpx.ASGITransport(build_api(Local(replica), "a", more_models=more))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json={**FAST, **b}) for b in bodies)
            )
            return answers, (await client.get("/metrics")).text

    return asyncio.run(send())


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_each_request_is_answered_by_its_model(replica: MultiplexedDenoiser) -> None:
    """Alone or in a crowd, and whichever of the three had to go for it; a request without a model is the first's."""
    alone = {}
    for name in "abc":
        ((answer,), metrics) = ask_all(replica, {"model": name})
        alone[name] = text_of(answer)
        assert (
            f'llada_version_requests_total{{model="{name}",status="200",version="{name}-1"}} 1.0' in metrics
        )
    assert len(set(alone.values())) == 3
    assert replica._cache.names == ["b", "c"]
    answers, _ = ask_all(replica, *({"model": name} for name in "abcabcabc"), {})
    assert [text_of(answer) for answer in answers] == [alone[name] for name in "abcabcabca"]
    replica.check_health()
    asyncio.run(replica.canary())
    assert replica.stats().rows == 6 * (3 + 10) + 1  # also of those that have gone
    assert replica.stats().rows_most == 2 * 4


def test_what_cannot_be_loaded_is_one_line_and_others_go_on(
    folders: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(folders["b"], bad := tmp_path / "bad")
    weights = bad / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    offered = {"a": Offered(str(folders["a"]), "a"), "b": Offered(str(bad), "b")}
    replica = MultiplexedDenoiser(offered, 1, SAMPLING)
    with caplog.at_level(logging.WARNING):
        answers, _ = ask_all(replica, {"model": "b"}, {"model": "a"}, {"model": "b"})
        late, _ = ask_all(replica, {"model": "b"})
    assert [answer.status_code for answer in [*answers, *late]] == [503, 200, 503, 503]
    error = late[0].json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_unavailable")
    assert int(late[0].headers["retry-after"]) > 0
    assert str(bad) not in late[0].text
    (line,) = [record.getMessage() for record in caplog.records if record.name == multiplexed.__name__]
    assert line.startswith(
        f"the model b cannot be loaded, and requests for it get status 503: cannot serve {bad}"
    )
    assert replica._cache.names == ["a"]  # it was not sent away for it
    weights.write_bytes(whole)
    monkeypatch.setattr(replica, "_failures", {})  # later
    ((answer,), _) = ask_all(replica, {"model": "b"})
    assert text_of(answer)
    replica.close()
    with pytest.raises(UserError, match="cannot serve"):
        MultiplexedDenoiser({"b": Offered(str(tmp_path), "b"), "a": offered["a"]}, 1, SAMPLING)


def test_those_who_wait_for_a_model_are_work(replica: MultiplexedDenoiser) -> None:
    async def look() -> tuple[dict[str, float], dict[str, float]]:
        idle = await replica.record_autoscaling_stats()
        asked = [asyncio.ensure_future(replica._cache.take("b")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting = await replica.record_autoscaling_stats()
        await asyncio.gather(*asked)
        return idle, waiting

    idle, waiting = asyncio.run(look())
    assert idle[REPLIES] == idle[WORK] == 0
    assert idle[USUAL_REQUEST] == idle[MEAN_REQUEST] > 0
    assert waiting[REPLIES] == 3
    assert waiting[WORK] == 3 * idle[MEAN_REQUEST]


def test_the_memory_of_those_that_went_is_free(small_model: Path, tmp_path: Path) -> None:
    offered = {}
    for seed, name in enumerate("ab"):
        folder = make_model(tmp_path / name, small_model, seed, width=640)
        offered[name] = Offered(str(folder), name)
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert size > 30 << 20
    replica = MultiplexedDenoiser(offered, 1, SAMPLING)
    process, used = psutil.Process(), []
    for name in "aba":
        ask_all(replica, {"model": name})
        used.append(process.memory_full_info().uss)
    replica.close()
    assert max(used[1:]) < used[0] + size / 2


# --- On Ray Serve -----------------------------------------------------------------------------------------------------


PER_ENGINE = 8  # rows that an engine takes at a time


@pytest.fixture
def endpoint(
    local_ray: Path, folders: dict[str, Path], free_port: Callable[[], int]
) -> Iterator[httpx.Client]:
    """Two replicas, each with room for two of three models."""
    import ray.serve

    args = ServeArgs(
        str(folders["a"]),
        more_models=tuple(f"{name}={folders[name]}" for name in "bc"),
        models_per_replica=2,
        min_replicas=2,
        max_replicas=2,
        cpus_per_replica=0.0,
        max_ongoing_requests=PER_ENGINE,
        port=free_port(),
    )
    url = serve(args, ClusterConfig(), blocking=False)
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client
    ray.serve.shutdown()


def metric(client: httpx.Client, name: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(s.value for family in families for s in family.samples if s.name == name)


def test_requests_find_a_replica_that_has_their_model(endpoint: httpx.Client) -> None:
    """Both replicas have the first one, and each of the others is on one of them alone, whatever is asked. A crowd for all three
    makes models go, with which nothing is lost of what they have done."""
    assert [card["id"] for card in endpoint.get("/v1/models").json()["data"]] == ["a", "b", "c"]

    def ask(name: str) -> str:
        return text_of(endpoint.post("/v1/completions", json={**FAST, "model": name}))

    alone = {}
    for name in "abc":
        alone[name] = ask(name)
        time.sleep(3)  # until Serve's routers know, of whom nobody can ask it
    assert len(set(alone.values())) == 3
    for name in "bcbcbcbcbc":
        assert ask(name) == alone[name]
    deadline = time.monotonic() + 60
    while metric(endpoint, "llada_batch_rows_most") != 4 * PER_ENGINE:  # two models on each
        assert time.monotonic() < deadline
        time.sleep(0.5)
    with ThreadPoolExecutor(6) as pool:
        assert [*pool.map(ask, "abc" * 8)] == [alone[name] for name in "abc" * 8]
    assert endpoint.get("/health").json() == {"status": "ok"}
    forwards = metric(endpoint, "llada_forwards_total")
    assert forwards == 6 * (3 + 10 + 24)
    deadline = time.monotonic() + 60
    # As many rows as forwards of replies, and those of Serve's canaries.
    while metric(endpoint, "llada_batch_rows_total") < forwards:
        assert time.monotonic() < deadline
        time.sleep(0.5)
