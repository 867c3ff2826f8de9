"""What the endpoint costs around the network: CPU time of a request and of a streamed token, by process.

    python tests/benchmarks/serving.py [--as NAME] [--repository FOLDER] [--requests N] [--tokens N] [--streams N]
                                       [--results FOLDER] [--quick]

Starts `llada serve` with a network of random weights, which is as good as free, and sends it, one after the other,
    request   a reply of one token
    stream    a streamed reply of `--tokens` tokens, one a forward; a token's cost is what it takes beyond a request
What Ray's proxy (of commits that have one here), the gateway and the replica have used meanwhile stands in /proc; what they use
while nobody asks is taken off.
The replica's includes the engine: what the same replies cost in one process without HTTP and Ray is given beside it.
    held      `--streams` streamed replies at a time, on an endpoint that takes so many: how many fail
    full      how soon an endpoint whose queue is full says 429
    profile   where the three processes spend their time under such requests and streams (py-spy): self time by package, and the
              functions with most of it, in % of what the process works

Ten minutes on a quiet machine. Writes serving.json, with one entry for each `--as`: the others in the file stay, so that
`--as before --repository CLONE` compares with another commit. --quick does little, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import psutil

HERE = Path(__file__).resolve().parent
PATIENCE_S = 300.0
# How Ray calls the processes that a request goes through.
PROCESSES = {
    "proxy": ("ray::ProxyActor",),
    "gateway": ("ray::ServeReplica:llada:Gateway",),
    "replica": ("ray::ServeReplica:llada:Denoiser",),
}
# Blocks of one token: each can be read as soon as it is there.
ASKED = {"prompt": "One, two", "temperature": 0, "block_length": 1}
TOP = 12  # functions of a profile


@dataclass(frozen=True)
class Setting:
    """How much is asked."""

    requests: int
    tokens: int
    """Of a streamed reply."""
    replies: int
    """That are streamed one after the other."""
    streams: int
    """That are held at a time, each of `held_tokens`."""
    held_tokens: int
    rejected: int
    """Requests that find the queue full."""
    idle_s: float
    profile_s: float
    """Of requests, and of streams."""


FULL = Setting(600, 256, 12, 200, 48, 200, 20.0, 15.0)
QUICK = Setting(4, 8, 2, 4, 8, 4, 1.0, 2.0)


def write_model(folder: Path) -> None:
    """Random weights whose greedy replies never end early."""
    import torch

    from llada.model.hf import save_model
    from llada.model.transformer import ModelConfig, Transformer
    from llada.tokenizer import END_OF_TURN, save_tokenizer, train_tokenizer

    tokenizer = train_tokenizer(["The cat sat on the mat.", "One, two, three. Go on!"] * 5, 320)
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    config = ModelConfig(len(tokenizer), 32, 2, 2, 64, max_length=2048, mask_token_id=mask, eos_token_id=eos)
    model = Transformer(config)
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight[[eos, tokenizer.convert_tokens_to_ids(END_OF_TURN)]] = 0
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)


# --- The endpoint -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    url: str
    processes: dict[str, list[psutil.Process]]

    def used(self) -> dict[str, float]:
        """Seconds of CPU of each process, and of the clock, since some moment."""
        used = {}
        for name, processes in self.processes.items():
            times = [process.cpu_times() for process in processes]
            used[name] = sum(each.user + each.system for each in times)
        return used | {"seconds": time.monotonic()}


@contextlib.contextmanager
def serving(repository: Path, model: Path, *words: str) -> Iterator[Endpoint]:
    """`llada serve` of a checkout, until the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.serve", "--model", str(model), "--port", str(port), *words]
    with tempfile.TemporaryFile("w+") as log:
        environment = os.environ | {"PYTHONPATH": str(repository)}
        process = subprocess.Popen(command, cwd=repository, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + PATIENCE_S
            url = f"http://127.0.0.1:{port}"
            while not _is_healthy(url):
                log.seek(0)
                assert process.poll() is None, log.read()
                assert time.monotonic() < deadline, log.read()
                time.sleep(0.3)
            below = psutil.Process(process.pid).children(recursive=True)
            named = [(Path((each.cmdline() or [""])[0]).name, each) for each in below if each.is_running()]
            found = {
                part: [each for name, each in named if name.startswith(titles)]
                for part, titles in PROCESSES.items()
            }
            assert found["gateway"], named
            assert found["replica"], named
            yield Endpoint(url, found)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


# --- Requests ---------------------------------------------------------------------------------------------------------


async def ask(client: httpx.AsyncClient, tokens: int) -> int:
    """A whole reply; the HTTP status."""
    answer = await client.post("/v1/completions", json=ASKED | {"max_tokens": tokens})
    if answer.status_code == 200:
        assert answer.json()["usage"]["completion_tokens"] == tokens
    return answer.status_code


async def read_stream(client: httpx.AsyncClient, tokens: int) -> int:
    """A streamed reply, to its end; the number of its events. Raises for one that breaks off."""
    body = ASKED | {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        text = (await answer.aread()).decode()
    *events, usage, done, _ = text.split("\n\n")
    assert done == "data: [DONE]", text[-300:]
    found = json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"]
    assert found == tokens, f"{found} tokens of {tokens}"
    return len(events)


def with_client(endpoint: Endpoint, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=PATIENCE_S, limits=limits) as client:
            return await work(client)

    return asyncio.run(run())


async def repeat(work: Callable[[], Awaitable[Any]], times: int) -> list[Any]:
    return [await work() for _ in range(times)]


# --- What is measured -------------------------------------------------------------------------------------------------


def measure_costs(endpoint: Endpoint, setting: Setting) -> dict[str, Any]:
    """Milliseconds of CPU of a 1-token request and of a streamed token, by process."""

    async def measure(client: httpx.AsyncClient) -> dict[str, Any]:
        await repeat(lambda: ask(client, 1), max(setting.requests // 10, 2))  # to get warm
        await repeat(lambda: read_stream(client, setting.tokens), 2)
        marks = [endpoint.used()]
        await asyncio.sleep(setting.idle_s)
        marks.append(endpoint.used())
        assert set(await repeat(lambda: ask(client, 1), setting.requests)) == {200}
        marks.append(endpoint.used())
        events = await repeat(lambda: read_stream(client, setting.tokens), setting.replies)
        marks.append(endpoint.used())
        idle, asked, streamed = (
            {name: after[name] - before[name] for name in after}
            for before, after in itertools.pairwise(marks)
        )

        def milliseconds(used: dict[str, float], name: str) -> float:
            return 1e3 * (used[name] - idle[name] * used["seconds"] / idle["seconds"])

        request = {name: milliseconds(asked, name) / setting.requests for name in PROCESSES}
        tokens = setting.replies * (setting.tokens - 1)
        token = {
            name: (milliseconds(streamed, name) - setting.replies * request[name]) / tokens
            for name in PROCESSES
        }
        return {
            "idle_ms_per_second": {name: 1e3 * idle[name] / idle["seconds"] for name in PROCESSES},
            "request_ms": request | {"all": sum(request.values())},
            "token_ms": token | {"all": sum(token.values()), "ingress": token["proxy"] + token["gateway"]},
            "events_per_token": sum(events) / (setting.replies * setting.tokens),
            "request_seconds": asked["seconds"] / setting.requests,
        }

    return with_client(endpoint, measure)


# In a process of its own, with the code of the checkout.
ALONE = """
import asyncio, json, sys, time
from llada.sampling.config import SamplingConfig
from llada.sampling.engine import DenoiseEngine
from llada.sampling.request import GenerateRequest
import llada

folder, prompt, requests, tokens, replies = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
model, tokenizer = llada.load(folder)
engine = DenoiseEngine(model, tokenizer)

async def run(times, length):
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(times):
        request = GenerateRequest(ids, SamplingConfig(gen_length=length, steps=None, block_length=1))
        async for _ in engine.stream(request):
            pass

asyncio.run(run(requests // 10 + 2, 1))
marks = [time.process_time()]
for times, length in ((requests, 1), (replies, tokens)):
    asyncio.run(run(times, length))
    marks.append(time.process_time())
request = (marks[1] - marks[0]) / requests
token = (marks[2] - marks[1] - replies * request) / (replies * (tokens - 1))
print(json.dumps({"request_ms": 1e3 * request, "token_ms": 1e3 * token}))
"""


def measure_engine(repository: Path, model: Path, setting: Setting) -> dict[str, float]:
    """The same replies by the engine alone."""
    numbers = [str(number) for number in (setting.requests, setting.tokens, setting.replies)]
    command = [sys.executable, "-c", ALONE, str(model), ASKED["prompt"], *numbers]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(command, env=environment, cwd=repository, stdout=subprocess.PIPE, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def hold_streams(endpoint: Endpoint, setting: Setting) -> dict[str, Any]:
    """Many streams at a time."""

    async def hold(client: httpx.AsyncClient) -> dict[str, Any]:
        began = time.monotonic()
        streams = [read_stream(client, setting.held_tokens) for _ in range(setting.streams)]
        results = await asyncio.gather(*streams, return_exceptions=True)
        errors = Counter(
            f"{type(each).__name__}: {each}"[:200] for each in results if not isinstance(each, int)
        )
        return {
            "streams": setting.streams,
            "errors": sum(errors.values()),
            "seconds": time.monotonic() - began,
            "said": dict(errors.most_common(3)),
        }

    return with_client(endpoint, hold)


def reject(endpoint: Endpoint, setting: Setting, room: int) -> dict[str, Any]:
    """How soon a full queue is said: seconds from a request to its whole answer. `room`: what the endpoint takes and queues."""

    async def measure(client: httpx.AsyncClient) -> dict[str, Any]:
        full = [asyncio.create_task(ask(client, 2000)) for _ in range(room + 2)]
        # The first that is over is one too many: from then on the queue is full, for minutes.
        over, _ = await asyncio.wait(full, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        assert {each.result() for each in over} == {429}, "the queue does not fill"
        seconds, statuses = [], Counter[int]()
        for _ in range(setting.rejected):
            began = time.perf_counter()
            statuses[await ask(client, 1)] += 1
            seconds.append(time.perf_counter() - began)
        for each in full:
            each.cancel()
        await asyncio.gather(*full, return_exceptions=True)
        p95 = statistics.quantiles(seconds, n=20)[-1]
        return {"statuses": statuses, "p50_ms": 1e3 * statistics.median(seconds), "p95_ms": 1e3 * p95}

    return with_client(endpoint, measure)


# --- Profiles ---------------------------------------------------------------------------------------------------------


def profile(endpoint: Endpoint, setting: Setting) -> dict[str, Any]:
    """{"request" and "stream": {process: shares of its working time in %}}."""
    loads: dict[str, Callable[[httpx.AsyncClient], Awaitable[Any]]] = {
        "request": lambda client: ask(client, 1),
        "stream": lambda client: read_stream(client, setting.tokens),
    }
    return {name: _profile(endpoint, load, setting.profile_s) for name, load in loads.items()}


def _profile(
    endpoint: Endpoint, load: Callable[[httpx.AsyncClient], Awaitable[Any]], seconds: float
) -> dict[str, Any]:
    firsts = {name: processes[0] for name, processes in endpoint.processes.items() if processes}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        spies = []
        for name, process in firsts.items():
            words = ["--pid", str(process.pid), "--duration", f"{seconds:.0f}", "--rate", "200"]
            words += [
                "--format",
                "raw",
                "--output",
                f"{folder}/{name}",
                "--full-filenames",
                "--nonblocking",
                "--gil",
            ]
            command = [str(Path(sys.executable).with_name("py-spy")), "record", *words]
            spy = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(spy.wait)
            spies.append(spy)

        async def run(client: httpx.AsyncClient) -> None:
            while any(spy.poll() is None for spy in spies):
                await load(client)

        with_client(endpoint, run)
        return {name: summarise(Path(folder, name).read_text()) for name in firsts}


def summarise(stacks: str) -> dict[str, dict[str, float]]:
    """Of py-spy's raw stacks: where the samples were, by the package and by the function at their ends, in %."""
    packages, functions = Counter[str](), Counter[str]()
    for line in stacks.splitlines():
        frames, _, count = line.rpartition(" ")
        function, _, place = frames.split(";")[-1].partition(" (")
        package = _package(place)
        packages[package] += int(count)
        functions[f"{package}: {function}"] += int(count)
    total = sum(packages.values()) or 1
    return {
        "packages": {name: round(100 * n / total, 1) for name, n in packages.most_common(TOP)},
        "functions": {name: round(100 * n / total, 1) for name, n in functions.most_common(TOP)},
    }


def _package(place: str) -> str:
    """Of a frame's place, such as `/…/site-packages/ray/serve/x.py:12)`: "ray/serve"."""
    path = place.rpartition(":")[0]
    inside = re.split(r"site-packages/|lib/python3\.\d+/", path)[-1]
    if inside == path:  # our own code
        inside = "/".join(path.split("/")[-3:])
    return "/".join(part.removesuffix(".py") for part in inside.lstrip("/").split("/")[:2]) or "?"


def measure(repository: Path, setting: Setting) -> dict[str, Any]:
    """One entry of the report."""
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "tiny")
        write_model(model)
        found: dict[str, Any] = {"engine_alone": measure_engine(repository, model, setting)}
        small = ("--max-ongoing-requests", "4", "--max-queued-requests", "4")
        with serving(repository, model, *small) as endpoint:
            found |= measure_costs(endpoint, setting)
            found["full"] = reject(endpoint, setting, 4 + 4)
            found["profile"] = profile(endpoint, setting)
        wide = ("--max-ongoing-requests", str(setting.streams))
        with serving(repository, model, *wide) as endpoint:
            found["held"] = hold_streams(endpoint, setting)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--as", dest="name", default="now", help="of this entry in the report")
    parser.add_argument("--repository", type=Path, default=HERE.parents[1], help="the checkout to measure")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--tokens", type=int, help="of a streamed reply")
    parser.add_argument("--streams", type=int, help="held at a time")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    chosen = {name: getattr(arguments, name) for name in ("requests", "tokens", "streams")}
    setting = Setting(
        **asdict(QUICK if arguments.quick else FULL)
        | {name: n for name, n in chosen.items() if n is not None}
    )
    import ray
    from sampling_model import machine

    repository = arguments.repository.resolve()
    entry: dict[str, Any] = {
        "machine": machine(repository) | {"ray": ray.__version__},
        "setting": asdict(setting),
    }
    entry |= measure(repository, setting)
    entry["machine"]["load_after"] = os.getloadavg()[0]
    for unit, title in (("request_ms", "a request"), ("token_ms", "a streamed token")):
        parts = "   ".join(f"{name} {ms:.2f}" for name, ms in entry[unit].items())
        print(f"{title:18} ms of CPU: {parts}   (engine alone {entry['engine_alone'][unit]:.2f})")
    print(f"events a token     {entry['events_per_token']:.2f}")
    print(f"a full queue       429 after {entry['full']['p95_ms']:.1f} ms (p95)")
    print(f"streams at a time  {entry['held']['streams']}, of which {entry['held']['errors']} failed")
    target = arguments.results / "serving.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(target.read_text()) if target.exists() else {}
    target.write_text(json.dumps(report | {arguments.name: entry}, indent=1) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
