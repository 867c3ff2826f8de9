"""The serving engine beside dlmserve's and beside static batches: the same requests, weights, blocks and steps.

    python tests/benchmarks/engine.py FOLDER [--dlmserve-python PATH] [--cache NAME] [--repeats N] [--results FOLDER]

FOLDER is what `sampling_model.py` has made. PATH is the python of another environment (dlmserve wants transformers < 5):
    pip install "torch==2.13.*" "transformers>=4.49,<5" prometheus_client
    pip install --no-deps dlmserve==0.1.1
Without it that contestant is left out with a word. Contestants, each in a process of its own for every race:
    ours      DenoiseEngine, text streamed
    dlmserve  dlmserve.engine's own loop, scheduler and step_batch, around our network (it answers in one piece)
    static    llada.generate on batches in the order of arrival: whoever is waiting then, all clients at the most
    padded    the same, as static batching is done where rows cannot be packed: each forward takes all rows of the batch,
              padded to the longest, until the last of them has ended
With --cache, ours and static once more with that way to run the forward (CACHES of sampling.py).

1, 8 and 32 clients, each of which sends its next request when its last one is answered; 128 requests, but 32 of one client
and in "random", where 32 clients send one each. dlmserve takes no more than 8 into one batch. Prompts have 37 to 110 tokens; a client asks for 16, 32 or 48 tokens, enough for its answer (2 to 32) and EOS. Modes: "one" token a forward, where all
compute the same but for rounding and the length of the canvas; "parallel", each by its own rule (threshold 0.9; dlmserve's LocalLeap as its engine sets it for a
model that it does not know); "random": four tokens a forward, 20 M random weights, whole canvases.

Figures, medians of the repeats with their range: tokens before EOS per second of CPU and of wall time, exact match, share
of the texts that are ours (a static batch has the canvas of its longest request, which may change a text), time to the
first text (p50, p95) and to the whole reply (p95), forwards, token-forwards (both counted at the network's embedding,
padding included), the share of the CPU time that is spent outside of the network: of the process, clients and their
tokenising included, and of ours that of the engine's thread, which streams and events are part of. Writes engine.json.
--quick runs few requests, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BLOCK = 16
CANVASES = (16, 32, 48)
CONCURRENT = (1, 8, 32)
REQUESTS = 128  # of a race
MODES = {
    "one": {"model": "trained", "rule": "one"},
    "parallel": {"model": "trained", "rule": "parallel"},
    "random": {"model": "random-20m", "rule": "four"},
}
THRESHOLD = 0.9
A_FORWARD = {"one": 1, "parallel": 1, "four": 4}  # tokens, at the least


class Request(NamedTuple):
    prompt: str
    gen_length: int
    answer: str


class Reply(NamedTuple):
    """`tokens`: before EOS. `first_text`: the clock when something could be read."""

    text: str
    tokens: int
    first_text: float


Answer = Callable[[Request], Awaitable[Reply]]


def build_requests(number: int) -> list[Request]:
    from sampling_model import held_out

    source = random.Random("requests")
    requests = []
    for problem in held_out(number, seed=1):
        fitting = [length for length in CANVASES if length > len(problem.answer)]
        requests.append(Request(problem.prompt, source.choice(fitting), problem.answer))
    return requests


# --- Contestants: a server that answers requests, in the process that it has for itself ---------------------------------


class Network(NamedTuple):
    model: Any
    tokenizer: Any
    eos_id: int | None  # None: random weights, whole canvases


class Server(NamedTuple):
    answer: Answer
    thread_cpu_s: Callable[[], float] | None = None
    """So far, of the thread that runs the network, where it does nothing else."""


@asynccontextmanager
async def serve_ours(network: Network, rule: str, cache: str | None) -> Any:
    from sampling import CACHES

    from llada.sampling.config import SamplingConfig
    from llada.sampling.engine import DenoiseEngine
    from llada.sampling.events import Finished, Text
    from llada.sampling.request import GenerateRequest
    from llada.tokenizer import encode_texts

    more: dict[str, Any] = {"threshold": THRESHOLD} if rule == "parallel" else {}
    more |= CACHES[cache or "none"]
    engine = DenoiseEngine(network.model, network.tokenizer, max_concurrent=max(CONCURRENT))

    async def answer(request: Request) -> Reply:
        sampling = SamplingConfig(
            gen_length=request.gen_length,
            steps=request.gen_length // A_FORWARD[rule],
            block_length=BLOCK,
            **more,
        )
        prompt = encode_texts(network.tokenizer, [request.prompt])[0]
        ends = frozenset() if network.eos_id is None else None
        text, tokens, first = "", 0, None
        async for event in engine.stream(GenerateRequest(prompt, sampling, seed=0, end_ids=ends)):
            if isinstance(event, Text) and event.text:
                first = time.perf_counter() if first is None else first
                text += event.text
            elif isinstance(event, Finished):
                tokens = event.completion_tokens
        return Reply(text, tokens, time.perf_counter() if first is None else first)

    try:
        thread = engine._thread.ident
        assert thread is not None
        clock = time.pthread_getcpuclockid(thread)
        yield Server(answer, lambda: time.clock_gettime(clock))
    finally:
        engine.close()


class Job(NamedTuple):
    """A static batch: prompts, the masks of each row, the settings."""

    prompts: list[list[int]]
    length: int
    knobs: dict[str, Any]


def answer_packed(network: Network, job: Job) -> list[list[int]]:
    import llada

    out = llada.generate(network.model, job.prompts, eos_id=network.eos_id, seed=0, **job.knobs)
    return out.sequences[:, -job.length :].tolist()


def answer_padded(network: Network, job: Job) -> list[list[int]]:
    """Our sampler's steps around forwards of whole, padded rows; those that have ended are fed to the last forward."""
    import torch

    from llada.sampling.canvas import prompt_canvas
    from llada.sampling.config import SamplingConfig
    from llada.sampling.sampler import commit, plan

    config = SamplingConfig(**job.knobs)
    canvas = prompt_canvas(
        job.prompts, config, mask_id=network.tokenizer.mask_token_id, eos_id=network.eos_id, seed=0
    )
    with torch.no_grad():
        while (step := plan(canvas)) is not None:
            where = torch.zeros_like(canvas.attended)
            where[step.rows] = step.where
            commit(canvas, step, network.model(canvas.tokens, canvas.attended, logits_at=where))
    return canvas.tokens[:, -job.length :].tolist()


@asynccontextmanager
async def serve_static(
    network: Network,
    rule: str,
    cache: str | None,
    answer_all: Callable[[Network, Job], list[list[int]]] = answer_packed,
) -> Any:
    """Whoever waits is answered together; meanwhile the others wait."""
    from sampling import CACHES

    from llada.tokenizer import encode_texts

    more: dict[str, Any] = {"threshold": THRESHOLD} if rule == "parallel" else {}
    more |= CACHES[cache or "none"]
    waiting: asyncio.Queue[tuple[Request, asyncio.Future[Reply]]] = asyncio.Queue()

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            while len(batch) < max(CONCURRENT) and not waiting.empty():
                batch.append(waiting.get_nowait())
            length = max(request.gen_length for request, _ in batch)
            prompts = encode_texts(network.tokenizer, [request.prompt for request, _ in batch])
            knobs = {
                "gen_length": length,
                "steps": length // A_FORWARD[rule],
                "block_length": BLOCK,
                **more,
            }
            rows = answer_all(network, Job([list(prompt) for prompt in prompts], length, knobs))
            now = time.perf_counter()
            for (request, future), row in zip(batch, rows, strict=True):
                ids = before_end(row[: request.gen_length], network.eos_id)
                future.set_result(Reply(network.tokenizer.decode(ids), len(ids), now))
            await asyncio.sleep(0)  # the clients send their next requests

    async def answer(request: Request) -> Reply:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        waiting.put_nowait((request, future))
        return await future

    worker = asyncio.create_task(work())
    try:
        yield Server(answer)
    finally:
        worker.cancel()


@asynccontextmanager
async def serve_dlmserve(network: Network, rule: str, cache: str | None) -> Any:
    """dlmserve's Engine without its loader: our network and tokenizer stand where the loader would put its own."""
    import torch
    from dlmserve.engine import _LOCAL_LEAP_FALLBACK, Engine
    from dlmserve.models.llada import LoadedLLaDA
    from dlmserve.sampler import SamplingParams
    from dlmserve.scheduler import DiffusionScheduler

    assert cache is None

    class WithLogits:
        """What step_batch looks at: the signature of `forward`, and `.logits` of a call."""

        def forward(self, input_ids: Any, attention_mask: Any = None) -> SimpleNamespace:
            return SimpleNamespace(logits=network.model(input_ids, attention_mask=attention_mask))

        __call__ = forward

    engine = Engine.__new__(Engine)
    engine._loaded = LoadedLLaDA(
        WithLogits(), network.tokenizer, torch.device("cpu"), "bf16", network.tokenizer.mask_token_id
    )
    engine._scheduler = DiffusionScheduler()
    engine._shutdown = False

    async def answer(request: Request) -> Reply:
        params = SamplingParams(
            num_denoising_steps=request.gen_length // A_FORWARD[rule],
            gen_length=request.gen_length,
            block_length=BLOCK,
        )
        if rule == "parallel":
            anchor, neighbour, radius = _LOCAL_LEAP_FALLBACK
            params = replace(
                params,
                use_local_leap=True,
                local_leap_anchor_threshold=anchor,
                local_leap_neighbor_threshold=neighbour,
                local_leap_radius=radius,
            )
        (output,) = await engine.generate_async([request.prompt], params, prerendered=True)
        ids = before_end(output.output_ids.tolist(), network.eos_id)
        return Reply(network.tokenizer.decode(ids), len(ids), time.perf_counter())

    loop = asyncio.create_task(engine._engine_loop())
    try:
        yield Server(answer)
    finally:
        loop.cancel()


SERVERS: dict[str, Any] = {
    "ours": serve_ours,
    "static": serve_static,
    "padded": functools.partial(serve_static, answer_all=answer_padded),
    "dlmserve": serve_dlmserve,
}


def before_end(ids: list[int], eos_id: int | None) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


async def race(
    answer: Answer, requests: list[Request], clients: int
) -> tuple[list[Reply], list[tuple[float, float]]]:
    """All requests by `clients` at a time; of each its reply, and the seconds to its first text and to its end."""
    replies: dict[int, Reply] = {}
    seconds: list[tuple[float, float]] = []
    source = iter(enumerate(requests))

    async def client() -> None:
        for number, request in source:
            began = time.perf_counter()
            replies[number] = reply = await answer(request)
            seconds.append((reply.first_text - began, time.perf_counter() - began))

    await asyncio.gather(*(client() for _ in range(clients)))
    return [replies[number] for number in range(len(requests))], seconds


async def run_contestant(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    import llada

    torch.set_num_threads(job["threads"])
    model, tokenizer = llada.load(job["model"])
    counted: dict[str, float] = {"nfe": 0, "token_forwards": 0, "network_cpu_s": 0.0}

    def count(_: Any, inputs: tuple[Any, ...]) -> None:
        counted["nfe"] += 1
        counted["token_forwards"] += inputs[0].numel()

    def start_clock(*_: Any) -> None:
        counted["network_cpu_s"] -= time.thread_time()

    def stop_clock(*_: Any) -> None:
        counted["network_cpu_s"] += time.thread_time()

    model.embed.register_forward_pre_hook(count)
    model.register_forward_pre_hook(start_clock)
    model.register_forward_hook(stop_clock)
    requests = [Request(*values) for values in job["requests"]]
    network = Network(model, tokenizer, None if "random" in job["model"] else tokenizer.eos_token_id)
    async with SERVERS[job["server"]](network, job["rule"], job["cache"]) as server:
        await race(server.answer, requests[:4], 4)  # warm
        # A server's replica does this too: a full pass of the collector over what was loaded takes 0.2 s.
        gc.collect()
        gc.freeze()
        counted.update(nfe=0, token_forwards=0, network_cpu_s=0.0)
        began = 0.0 if server.thread_cpu_s is None else server.thread_cpu_s()
        cpu, wall = time.process_time(), time.perf_counter()
        replies, seconds = await race(server.answer, requests, job["clients"])
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if server.thread_cpu_s is not None:
            thread = server.thread_cpu_s() - began
            counted["outside_network_of_thread"] = 1 - counted["network_cpu_s"] / thread
    first, whole = zip(*seconds, strict=True)
    tokens = sum(reply.tokens for reply in replies)
    return {
        "tokens": tokens,
        "tokens_per_cpu_s": tokens / cpu,
        "tokens_per_wall_s": tokens / wall,
        "cpu_s": cpu,
        "wall_s": wall,
        "first_text_p50_s": quantile(first, 0.5),
        "first_text_p95_s": quantile(first, 0.95),
        "reply_p50_s": quantile(whole, 0.5),
        "reply_p95_s": quantile(whole, 0.95),
        "exact_match": sum(
            reply.text == request.answer for request, reply in zip(requests, replies, strict=True)
        )
        / len(requests),
        **counted,
        "outside_network": 1 - counted["network_cpu_s"] / cpu,
        "texts": [reply.text for reply in replies],
    }


def quantile(values: Any, q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


# --- The race, from outside ---------------------------------------------------------------------------------------------


def start(python: str, job: dict[str, Any]) -> dict[str, Any] | str:
    """The figures of a contestant in a process of its own; what it said where it could not run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        file.write_text(json.dumps(job))
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(job["threads"]),
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [python, __file__, "--contestant", str(file)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        if lines and lines[-1].startswith(("llada.errors.UserError", "ModuleNotFoundError", "TypeError")):
            return lines[-1]
        raise RuntimeError(f"{job['server']} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summarise(runs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, the range of what is timed, and the share of the texts that are those of `ours`."""
    keys = [key for key in runs[0] if key != "texts"]
    summary: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in keys}
    equal = [a == b for a, b in zip(runs[0]["texts"], ours[0]["texts"], strict=True)]
    summary["same_as_ours"] = sum(equal) / len(equal)
    for key in ("tokens_per_cpu_s", "tokens_per_wall_s", "first_text_p95_s"):
        summary[f"{key}_range"] = [min(run[key] for run in runs), max(run[key] for run in runs)]
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="made by sampling_model.py")
    parser.add_argument("--dlmserve-python", help="python of an environment that holds dlmserve")
    parser.add_argument(
        "--cache",
        action="append",
        default=[],
        help="ours and static once more with this cache; may be repeated",
    )
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of a race")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--contestant", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(asyncio.run(run_contestant(json.loads(arguments.contestant.read_text())))))
        return
    if arguments.folder is None:
        parser.error("name the folder that sampling_model.py has made")
    from sampling import CACHES
    from sampling_model import machine

    if unknown := set(arguments.cache) - set(CACHES):
        parser.error(f"--cache {unknown.pop()!r} is none of {', '.join(CACHES)}")
    if arguments.quick:
        arguments.requests, arguments.repeats = 4, 1
    contestants: list[tuple[str, str, str | None]] = [("ours", "ours", None)]
    contestants += [(f"ours, {cache}", "ours", cache) for cache in arguments.cache]
    contestants.append(("static", "static", None))
    contestants += [(f"static, {cache}", "static", cache) for cache in arguments.cache]
    contestants += [("padded", "padded", None), ("dlmserve", "dlmserve", None)]
    skipped: dict[str, str] = {}
    if arguments.dlmserve_python is None:
        skipped["dlmserve"] = "no --dlmserve-python"
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {
            "block_length": BLOCK,
            "canvases": CANVASES,
            "threads": arguments.threads,
            "repeats": arguments.repeats,
            "static_batch": "as many as there are clients",
            "parallel": {
                "ours": f"threshold {THRESHOLD}",
                "static": f"threshold {THRESHOLD}",
                "dlmserve": "LocalLeap",
            },
            "dtype": "float32",
        },
        "races": [],
    }
    if arguments.dlmserve_python is not None:
        code = (
            "import importlib.metadata as m; "
            "print(*(f'{n} {m.version(n)}' for n in ('dlmserve', 'transformers', 'torch')), sep=', ')"
        )
        asked = subprocess.run(
            [arguments.dlmserve_python, "-c", code], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            report["machine"]["dlmserve"] = asked.stdout.strip()
        else:
            skipped["dlmserve"] = asked.stderr.strip().splitlines()[-1]
    for mode in arguments.modes:
        for clients in (4,) if arguments.quick else CONCURRENT:
            number = max(arguments.requests, 4 * clients)
            if (
                clients == 1 or mode == "random"
            ):  # one client takes longer, and 20 M weights are fourteen times the work
                number = max(clients, number // 4)
            job = {
                "model": str((arguments.folder / MODES[mode]["model"]).resolve()),
                "rule": MODES[mode]["rule"],
                "threads": arguments.threads,
                "clients": clients,
                "requests": build_requests(number),
            }
            runs: dict[str, list[dict[str, Any]]] = {}
            for repeat in range(arguments.repeats):
                for name, server, cache in contestants if repeat % 2 == 0 else contestants[::-1]:
                    if name in skipped:
                        continue
                    python = arguments.dlmserve_python if server == "dlmserve" else sys.executable
                    figures = start(python, {**job, "server": server, "cache": cache})
                    if isinstance(figures, str):
                        skipped[name] = figures
                    else:
                        runs.setdefault(name, []).append(figures)
            rows = {name: summarise(runs[name], runs["ours"]) for name, *_ in contestants if name in runs}
            print_race(mode, clients, rows)
            report["races"].append(
                {
                    "mode": mode,
                    "clients": clients,
                    "requests": number,
                    "contestants": rows,
                    "ratios": ratios(rows),
                }
            )
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}")
    report["skipped"] = skipped
    report["machine"]["load_after"] = os.getloadavg()[0]
    target = arguments.results / "engine.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {target}")


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times another's throughput is each of ours, and which share of its time to the first text."""
    result = {}
    for ours in (name for name in rows if name.startswith("ours")):
        for other in (name for name in rows if not name.startswith("ours")):
            for key in ("tokens_per_cpu_s", "tokens_per_wall_s", "first_text_p95_s"):
                result[f"{ours} / {other}: {key}"] = rows[ours][key] / rows[other][key]
    return result


def print_race(mode: str, clients: int, rows: dict[str, dict[str, Any]]) -> None:
    print(
        f"{mode}, {clients} clients    tokens/CPU s  tokens/s  exact  same  first p50    p95  reply p95  forwards  token-forwards  outside  of thread"
    )
    for name, row in rows.items():
        print(
            f"  {name:20} {row['tokens_per_cpu_s']:13.1f} {row['tokens_per_wall_s']:9.1f} {row['exact_match']:6.1%} {row['same_as_ours']:5.0%}"
            f" {row['first_text_p50_s']:9.2f}s {row['first_text_p95_s']:5.2f}s {row['reply_p95_s']:9.2f}s"
            f" {row['nfe']:9,.0f} {row['token_forwards']:15,.0f} {row['outside_network']:8.1%}"
            f" {row.get('outside_network_of_thread', float('nan')):10.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
