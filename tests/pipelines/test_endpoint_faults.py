"""An endpoint on a real Ray Serve while things happen to it: replicas are killed, come and go, versions change, clients leave.

The long versions, `pytest -m slow`. One death of each process is in test_serve.py, what else can be shown in one process in
tests/pipelines/serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipelines.serve import APP_NAME, serve, start_app
from pipelines.serving.args import ServeArgs
from pipelines.serving.listener import open_port
from pipelines.stage.cluster import ClusterConfig

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(3600)]
FAST = {"prompt": "The cat", "max_tokens": 24, "block_length": 8, "temperature": 1.0}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["own port", "proxy"])
def start(
    request: pytest.FixtureRequest, local_ray: Path, random_model: Path, free_port: Callable[[], int]
) -> Iterator[Callable[..., str]]:
    """start(**args) serves the model, or rolls over to it with other settings; the URL. At a port of its own, as `llada serve`
    does it, and behind Ray Serve's proxy, as on a cluster."""
    import ray.serve

    with open_port("127.0.0.1", 0) if request.param == "own port" else contextlib.nullcontext() as own:
        number = free_port()

        def start(**args: Any) -> str:
            given: dict[str, Any] = {"model": str(random_model), "model_id": "tiny", "cpus_per_replica": 0.0}
            given |= {"max_queued_requests": -1, "port": number, **args}
            if own is None:
                return serve(ServeArgs(**given), ClusterConfig(), blocking=False)
            start_app(ServeArgs(**given), str(local_ray), own)
            return own.url

        yield start
        ray.serve.shutdown()


def num_running() -> int:
    from ray import serve as ray_serve

    states = ray_serve.status().applications[APP_NAME].deployments["Denoiser"].replica_states
    return sum(number for state, number in states.items() if state == "RUNNING")


async def wait_for(what: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(what):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


def test_ten_killed_replicas_cost_no_answer(
    start: Callable[..., str], load_on: Any, replicas_of: Callable[..., list[psutil.Process]]
) -> None:
    """Two replicas under load, of which one is killed ten times: a request is answered, once and with its text, or breaks off
    with an error that says to come again."""
    url = start(min_replicas=2, max_replicas=2, max_ongoing_requests=8)
    load = load_on(url, clients=12)

    async def kill() -> None:
        async with load.running():
            for _ in range(10):
                await wait_for(lambda: num_running() == 2 and len(replicas_of("Denoiser")) >= 2)
                await asyncio.sleep(2)
                os.kill(random.choice(replicas_of("Denoiser")).pid, signal.SIGKILL)
            await wait_for(lambda: num_running() == 2)

    asyncio.run(kill())
    print(load.outcomes)
    assert load.outcomes["ok"] > 50
    assert load.outcomes.keys() <= {"ok", "503 retry", "broken service_unavailable_error"}
    assert all(len(texts) == 1 for texts in load.texts.values())


def test_a_killed_gateway_costs_what_it_had_in_hand(
    start: Callable[..., str], load_on: Any, replicas_of: Callable[..., list[psutil.Process]]
) -> None:
    """Another one takes its place; meanwhile nobody hangs, and afterwards everybody is answered."""
    url = start(min_replicas=1, max_replicas=1, max_ongoing_requests=8)
    load = load_on(url, clients=8)

    async def kill() -> None:
        async with load.running():
            await load.answered(8)
            (gateway,) = await asyncio.to_thread(replicas_of, "Gateway")
            os.kill(gateway.pid, signal.SIGKILL)
            await load.answered(50)
            assert "hung" not in load.outcomes
            load.outcomes.clear()
            await load.answered(50)

    asyncio.run(kill())
    assert load.outcomes.keys() == {"ok"}


def test_scaling_and_rolling_over_fail_nobody(start: Callable[..., str], load_on: Any) -> None:
    """1 → 3 → 1 replicas by the work there is, then three new versions one after the other, all under load."""
    scaling: dict[str, Any] = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 1.0}
    scaling |= {"max_ongoing_requests": 4, "upscale_delay_s": 1.0, "downscale_delay_s": 5.0}
    url = start(**scaling)

    async def scale() -> Counter[str]:
        few, many = load_on(url, clients=1, max_tokens=2), load_on(url, clients=8, max_tokens=200)
        async with few.running():
            async with many.running():
                await wait_for(lambda: num_running() == 3)
            await wait_for(lambda: num_running() == 1)
            for number in range(3):
                await asyncio.to_thread(
                    start, **scaling, max_choices=3 + number, stall_timeout_s=500.0 + number
                )
        return few.outcomes + many.outcomes

    outcomes = asyncio.run(scale())
    print(outcomes)
    assert outcomes.keys() == {"ok"}


def test_a_queue_waits_for_a_model_that_was_let_go(start: Callable[..., str]) -> None:
    url = start(min_replicas=0, max_replicas=1, downscale_delay_s=2.0)
    deadline = time.monotonic() + 300
    while num_running():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    with httpx.Client(base_url=url, timeout=180) as client:
        assert client.get("/health").json() == {"status": "ok"}
        time.sleep(5)
        assert num_running() == 0  # asking for the health does not wake it
        assert client.post("/v1/completions", json=FAST).status_code == 200


def test_two_hundred_streams_at_once(start: Callable[..., str], load_on: Any) -> None:
    url = start(min_replicas=1, max_replicas=1, max_ongoing_requests=200)
    load = load_on(url, clients=200, max_tokens=16)

    async def hold() -> None:
        async with load.running():
            await wait_for(lambda: load.outcomes.total() > 400)

    asyncio.run(hold())
    print(load.outcomes)
    assert load.outcomes.keys() == {"ok"}


def test_a_long_time_leaves_nothing_behind(start: Callable[..., str]) -> None:
    """5,000 requests, of which every tenth client leaves: memory, threads, files and places are as after the first 1,000."""
    url = start(min_replicas=1, max_replicas=1, max_ongoing_requests=16)

    async def ask(number: int) -> None:
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=url, timeout=180, limits=limits) as client:
            places = asyncio.Semaphore(16)

            async def one(seed: int) -> None:
                async with places:
                    body = {**FAST, "max_tokens": 8, "seed": seed, "stream": True}
                    async with client.stream("POST", "/v1/completions", json=body) as answer:
                        assert answer.status_code == 200
                        async for _ in answer.aiter_lines():
                            if seed % 10 == 0:
                                return  # with the stream open

            await asyncio.gather(*(one(seed) for seed in range(number)))

    def state() -> dict[str, tuple[float, int, int]]:
        """{process: (MiB, threads, open files)} of the gateway and the model."""
        found: dict[str, tuple[float, int, int]] = {}
        for process in psutil.Process().children(recursive=True):
            line = " ".join(process.cmdline())
            if "ServeReplica" in line or "ProxyActor" in line:
                name = next(name for name in ("Denoiser", "Gateway", "Proxy") if name in line)
                memory = process.memory_full_info().uss / 2**20
                found[name] = (memory, process.num_threads(), process.num_fds())
        assert {"Denoiser", "Gateway"} <= found.keys()
        return found

    asyncio.run(ask(1000))
    before = state()
    asyncio.run(ask(4000))
    after = state()
    print(before, after)
    for name, (memory, threads, files) in after.items():
        assert memory < before[name][0] + 40, name
        assert threads <= before[name][1] + 4, name
        assert files <= before[name][2] + 24, name
    with httpx.Client(base_url=url, timeout=60) as client:
        deadline = time.monotonic() + 60
        while True:
            text = client.get("/metrics").text
            values = {
                s.name: s.value
                for f in text_string_to_metric_families(text)
                for s in f.samples
                if not s.labels
            }
            open_now = [
                values[f"llada_{n}"] for n in ("requests_running", "requests_queued", "batch_rows_now")
            ]
            if open_now == [0, 0, 0]:
                break
            assert time.monotonic() < deadline, open_now
            time.sleep(1)
        assert values["llada_cancelled_replies_total"] > 0


def test_a_changed_alias_rolls_over_and_fails_nobody(
    random_model: Path, tmp_path: Path, load_on: Any, free_port: Callable[[], int]
) -> None:
    """`llada serve --model models:/tiny@champion`, and the alias moves to another version, then to one that cannot be served."""
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("tiny")
    for name in ("one", "two", "bad"):
        shutil.copytree(random_model, tmp_path / name)
        client.create_model_version("tiny", str(tmp_path / name))
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"nothing")
    client.set_registered_model_alias("tiny", "champion", "1")
    command = ["-m", "pipelines.serve", "--model", "models:/tiny@champion", "--alias-poll-s", "1"]
    command += ["--port", str(port := free_port()), "--cpus-per-replica", "0"]
    command += [
        "--more-models",
        f"b={tmp_path / 'two'}",
        "--canary",
        str(tmp_path / "two"),
        "--canary-share",
        "0.3",
    ]
    out = tmp_path / "out.txt"
    with out.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env={**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(REPOSITORY)},
        )
    load = load_on(f"http://127.0.0.1:{port}", clients=2, max_tokens=4)

    def says(text: str) -> bool:
        assert process.poll() is None, out.read_text()
        return text in out.read_text()

    async def change() -> str:
        await wait_for(lambda: says("serving tiny at"))
        async with (
            load.running(),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as asking,
        ):
            other = await asking.post("/v1/completions", json={**FAST, "model": "b"})
            assert (other.status_code, other.json()["model"]) == (200, "b")
            client.set_registered_model_alias("tiny", "champion", "2")
            await wait_for(lambda: says(f"now serving {tmp_path / 'two'}"))
            client.set_registered_model_alias("tiny", "champion", "3")
            await wait_for(
                lambda: says("the new version does not start, and the old one goes on: cannot serve")
            )
            await asyncio.sleep(3)
            return (await asking.get("/metrics")).text

    try:
        metrics = asyncio.run(change())
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 0
    assert load.outcomes.keys() == {"ok"}
    taken: Counter[tuple[str, str]] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "llada_version_requests_total":
                taken[sample.labels["model"], sample.labels["version"]] += int(sample.value)
    # The canary is that version which then is the stable one as well.
    assert taken["tiny", "two"] > 0
    assert taken["tiny", "two-canary"] > 0
