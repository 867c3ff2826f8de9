"""A whole pipeline run on tiny settings, made once: raw text to a fine-tuned checkpoint, on the session's Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
import pytest
import torch
from fastapi import FastAPI
from filelock import FileLock

from llada.config import Recipe
from llada.data.work.read_config import ReadConfig
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.presets import tiny
from llada.tokenizer import END_OF_TURN, save_tokenizer, train_tokenizer
from pipelines import cli
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.delivery import open_client

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A model restores the tokens that were masked.",
    "Every row of a batch has noise of its own.",
    "The loss is divided by the number of tokens.",
    "A checkpoint is a folder that anyone can load.",
)


def tiny_recipe(steps: int = 12) -> Recipe:
    """The preset `tiny`, shrunk to seconds."""
    recipe = tiny()
    model = replace(
        recipe.model,
        d_model=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        ffn_dim=64,
        vocab_size=320,
        max_length=96,
    )
    train = replace(
        recipe.pretrain.train,
        num_steps=steps,
        global_batch_tokens=8 * 32,
        micro_batch_rows=4,
        log_every=4,
        validate_every=6,
        validation_rows=16,
        checkpoint_every=6,
        precision="fp32",
    )
    run = replace(recipe.pretrain, train=train)
    prepare = replace(
        recipe.prepare, row_length=32, train_tokenizer_vocab=320, validation_fraction=0.2, read=ReadConfig()
    )
    return replace(
        recipe,
        model=model,
        prepare=prepare,
        pretrain=run,
        sft_prepare=replace(recipe.sft_prepare, row_length=64, validation_fraction=0.2),
        sft=replace(run, train=replace(train, global_batch_tokens=8 * 64)),
        sampling=replace(recipe.sampling, gen_length=16, steps=16, block_length=8),
    )


@pytest.fixture
def llada(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command as the terminal does: llada("plan", "tiny") is (exit code, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow without a run. MLflow makes one in seconds, as it migrates it through its whole history."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_client(f"sqlite:///{path}")
    return path


@pytest.fixture
def tracking_uri(database: Path, tmp_path: Path) -> str:
    """Of a copy of it in `tmp_path`, where a stage whose output is a folder there looks for one."""
    shutil.copy(database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@dataclass(frozen=True)
class Stages:
    """Folders of a finished run, all below `root`, tracked in root/mlflow.db."""

    root: Path
    recipe: Recipe
    cluster: ClusterConfig

    def __getattr__(self, name: str) -> str:
        return str(self.root / name)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.jsonl (200 documents) and chat.jsonl (60 pairs)."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [" ".join(SENTENCES[(i + j) % 5] for j in range(1 + i % 7)) + f" Number {i}." for i in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pairs = [{"prompt": f"What is {i}?", "response": SENTENCES[i % 5][:30]} for i in range(60)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture(scope="session")
def stages(local_ray: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """data, pretrained, sft_data, model: each by its stage, in an MLflow run, from the files in raw. Of the processes of a test
    run, the first that asks makes them."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # A process has a folder of its own in that of the test run.
        base = base.parent
    made = Stages(base / "stages", tiny_recipe(), ClusterConfig())
    with FileLock(base / "stages.lock"):
        if not (base / "stages.complete").exists():
            shutil.copytree(corpus, made.raw, dirs_exist_ok=True)
            make_stages(made)
            (base / "stages.complete").touch()
    return made


def make_stages(made: Stages) -> None:
    """Run the stages."""
    from pipelines.prepare import prepare
    from pipelines.pretrain import pretrain
    from pipelines.sft import sft
    from pipelines.stage.tracking import tracked

    common = {"cluster": made.cluster, "progress": False}
    with tracked("prepare", made.data) as tracker:
        prepare(
            made.recipe.prepare,
            inputs=[f"{made.raw}/text.jsonl"],
            output=made.data,
            tracker=tracker,
            **common,
        )
    with tracked("pretrain", made.pretrained) as tracker:
        pretrain(made.recipe, data=made.data, output=made.pretrained, tracker=tracker, **common)
    chat = replace(made.recipe.sft_prepare, tokenizer=f"{made.data}/tokenizer")
    with tracked("prepare", made.sft_data) as tracker:
        prepare(chat, inputs=[f"{made.raw}/chat.jsonl"], output=made.sft_data, tracker=tracker, **common)
    with tracked("sft", made.model) as tracker:
        sft(
            made.recipe,
            model=made.pretrained,
            data=made.sft_data,
            output=made.model,
            tracker=tracker,
            **common,
        )


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a random network: its replies are lively, and must be the same wherever it runs."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(["The cat sat on the mat.", "One, two, three. Go on! Grüße 🙂"] * 5, 320)
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    config = ModelConfig(len(tokenizer), 32, 2, 2, 64, max_length=2048, mask_token_id=mask, eos_token_id=eos)
    model = Transformer(config)
    model.init_weights(0)
    with torch.no_grad():  # logits of 0 where others reach 6: greedy replies never end early
        model.lm_head.weight.mul_(2)
        model.lm_head.weight[[eos, tokenizer.convert_tokens_to_ids(END_OF_TURN)]] = 0
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    return folder


@dataclass(frozen=True)
class RayCluster:
    """A Ray of two CPUs that stands by itself, with a job server that wants a token."""

    address: str
    token: str
    folder: Path
    """Of this machine, as are the nodes: a place that all of them have."""
    nodes_address: str
    """Where another node joins it."""
    environment: dict[str, str]
    """Of its nodes' processes."""

    @contextlib.contextmanager
    def node(self, cpus: int) -> Iterator[None]:
        """Another node for a `with` block, at whose end it is killed; with a network of its own, where this machine lets us."""
        words = [f"--address={self.nodes_address}", "--dashboard-agent-listen-port=0", f"--num-cpus={cpus}"]
        with (
            own_network() as (prefix, variables),
            _ray_start(self.folder, {**self.environment, **variables}, words, prefix),
        ):
            yield


@pytest.fixture(scope="session")
def ray_cluster(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[RayCluster]:
    """`ray start --head` with a token; processes of its own, which know nothing of this repository."""
    from ray.util import get_node_ip_address

    ports = [free_port() for _ in range(3)]
    token, folder = secrets.token_hex(16), tmp_path_factory.mktemp("cluster")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_ADDRESS": "",
        # Ray's own limits are for machines that have nothing else to do.
        "RAY_agent_register_timeout_ms": "300000",
        "RAY_worker_register_timeout_seconds": "300",
    }
    words = [
        "--head", f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}",
        "--dashboard-host=127.0.0.1", "--dashboard-agent-listen-port=0", "--num-cpus=2",
    ]  # fmt: skip
    address = f"http://127.0.0.1:{ports[1]}"
    with (
        # Of its own: by the usual one, /tmp/ray, a job's process would find the Ray that was started last on this machine.
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as sessions,
        _ray_start(folder, environment, [*words, f"--temp-dir={sessions}"]) as (process, log),
    ):
        deadline = time.monotonic() + 200
        while (status := _status(f"{address}/api/version")) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert status == 401, "it lets everybody in"
        yield RayCluster(address, token, folder, f"{get_node_ip_address()}:{ports[0]}", environment)


@contextlib.contextmanager
def own_network() -> Iterator[tuple[list[str], dict[str, str]]]:
    """What stands before a command that is to have a network of its own for a `with` block (a namespace of Linux, behind a cable
    to this machine), and variables for it; nothing, where making one is not permitted."""
    name, number = f"ll{secrets.token_hex(3)}", secrets.randbelow(256)
    here, there = f"{name}-a", f"{name}-b"

    def ip(words: str) -> bool:
        done = subprocess.run(["ip", *words.split()], capture_output=True, timeout=60, check=False)
        return done.returncode == 0

    if shutil.which("ip") is None or not ip(f"netns add {name}"):
        yield [], {}
        return
    steps = [
        f"link add {here} type veth peer name {there} netns {name}",
        f"addr add 10.213.{number}.1/30 dev {here}",
        f"link set {here} up",
        f"-n {name} addr add 10.213.{number}.2/30 dev {there}",
        f"-n {name} link set {there} up",
        f"-n {name} link set lo up",
        f"-n {name} route add default via 10.213.{number}.1",
    ]
    try:
        # By its name, PyTorch's gloo would look for this machine's address there.
        yield (
            (["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": there})
            if all(map(ip, steps))
            else ([], {})
        )
    finally:
        ip(f"link del {here}")
        ip(f"netns del {name}")


@contextlib.contextmanager
def _ray_start(
    folder: Path, environment: dict[str, str], words: list[str], prefix: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`ray start` with these words for a `with` block: the process and its log. At the end it is killed with all of its own."""
    log = folder / f"ray-{time.time_ns()}.log"
    common = ["--num-gpus=0", f"--object-store-memory={100 << 20}", "--disable-usage-stats", "--block"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", *words, *common],
            env=environment, cwd=folder, stdout=stream, stderr=stream,
        )  # fmt: skip
    try:
        yield process, log
    finally:
        for started in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                started.kill()
        process.wait(60)


def _status(url: str) -> int | None:
    """The HTTP status of an answer; None without one."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.fixture(scope="session")
def served() -> Callable[[FastAPI], contextlib.AbstractContextManager[str]]:
    """served(application) gives a `with` block its address, at a real server in a thread."""
    import uvicorn

    @contextlib.contextmanager
    def serve(application: FastAPI) -> Iterator[str]:
        server = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

    return serve


class Load:
    """So many clients who ask without a pause, every other one for a stream; every answer, in a word."""

    BODY: ClassVar = {"prompt": "The cat", "max_tokens": 24, "block_length": 8, "temperature": 1.0}
    SEEDS: ClassVar = 16

    def __init__(self, url: str, clients: int, timeout_s: float = 180, **fields: Any) -> None:
        self._url, self._clients, self._timeout_s, self._fields = url, clients, timeout_s, fields
        self.outcomes: Counter[str] = Counter()
        self.texts: dict[int, set[str]] = {}
        """By seed."""
        self._is_over = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=self._clients)
        async with httpx.AsyncClient(base_url=self._url, timeout=self._timeout_s, limits=limits) as client:
            tasks = [asyncio.create_task(self._ask(client, number)) for number in range(self._clients)]
            yield
            self._is_over = True
            await asyncio.gather(*tasks)

    async def answered(self, count: int) -> None:
        """Wait until so many more are answered in full."""
        deadline, before = time.monotonic() + 300, self.outcomes["ok"]
        while self.outcomes["ok"] < before + count:
            assert time.monotonic() < deadline, self.outcomes
            await asyncio.sleep(0.1)

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        while not self._is_over:
            seed, stream = number % self.SEEDS, bool(number % 2)
            number += self._clients + 1
            body = {**self.BODY, **self._fields, "seed": seed, "stream": stream}
            try:
                answer = await client.post("/v1/completions", json=body)
            except httpx.TimeoutException:
                self.outcomes["hung"] += 1
                continue
            except httpx.TransportError:
                self.outcomes["lost"] += 1
                continue
            self.outcomes[self._outcome(answer, seed, stream)] += 1

    def _outcome(self, answer: httpx.Response, seed: int, stream: bool) -> str:
        if answer.status_code != 200:
            return f"{answer.status_code}{' retry' if 'retry-after' in answer.headers else ''}"
        if not stream:
            text = answer.json()["choices"][0]["text"]
        else:
            *events, done, end = answer.text.split("\n\n")
            assert (done, end) == ("data: [DONE]", "")
            chunks = [json.loads(event.removeprefix("data: ")) for event in events]
            if "error" in chunks[-1]:
                return f"broken {chunks[-1]['error']['type']}"
            assert chunks[-1]["choices"][0]["finish_reason"]
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        self.texts.setdefault(seed, set()).add(text)
        return "ok"


@pytest.fixture(scope="session")
def load_on() -> type[Load]:
    """load_on(url, clients, **fields of the body)."""
    return Load


@pytest.fixture(scope="session")
def replicas_of() -> Callable[..., list[psutil.Process]]:
    """replicas_of("Denoiser"), or "Gateway", of an endpoint: its processes that are done with their start, below that of a pid or
    this one."""

    def find(deployment: str, pid: int | None = None) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile, or is a zombie
                if process.name().startswith("ray::ServeRepl") and deployment in " ".join(process.cmdline()):
                    found.append(process)
        return found

    return find
