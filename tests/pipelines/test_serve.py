"""The endpoint over real HTTP on a real Ray Serve, started as `llada serve` starts it, and its configuration."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.exceptions import RayServeException

from llada.errors import UserError
from llada.files import sha256
from llada.sampling.config import SamplingConfig
from llada.tokenizer import (
    SPECIAL_TOKENS,
    encode_texts,
    load_tokenizer,
)
from pipelines.serve import APP_NAME, build_app, build_deployments, serve
from pipelines.serving.args import ServeArgs
from pipelines.serving.keys import KeyLimits
from pipelines.serving.limits import RequestLimits
from pipelines.serving.multiplexed import Offered
from pipelines.serving.routes import Access
from pipelines.stage.cluster import ClusterConfig

REPOSITORY = Path(__file__).resolve().parents[2]
CHAT = [{"role": "user", "content": "How are you?"}]
CONTEXT = 2048  # of random_model
LONG = {"prompt": "Go", "max_tokens": 1900, "temperature": 0, "stream": True}  # many seconds of work
FAST = {"model": "tiny", "max_tokens": 20, "block_length": 8, "temperature": 1.0, "seed": 3}


# --- On Ray Serve -----------------------------------------------------------------------------------------------------

START = """
import json, sys
from pipelines.stage.cluster import ClusterConfig
from pipelines.serve import serve
from pipelines.serving.args import ServeArgs
serve(ServeArgs(**json.loads(sys.argv[1])), ClusterConfig(num_cpus=2))
"""


@contextlib.contextmanager
def serving(
    model: Path, out: Path, port: int, **args: Any
) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """A client of an endpoint in processes of its own, whose terminal is the file `out`."""
    args |= {"model": str(model), "port": port}
    with out.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(args)],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            # A machine that has other things to do is not said to have no room.
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "RAY_SERVE_SLOW_STARTUP_WARNING_S": "300",
            },
        )
    try:
        deadline = time.monotonic() + 240
        while "serving tiny at" not in out.read_text():
            assert process.poll() is None, out.read_text()
            assert time.monotonic() < deadline, out.read_text()
            time.sleep(0.2)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=180) as client:
            while client.get("/health").json() != {"status": "ok"}:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield client, process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="class")
def server(
    random_model: Path, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[httpx.Client]:
    """A client of the endpoint; at the end, SIGTERM must take it down quietly and with exit code 0."""
    out = tmp_path_factory.mktemp("serve") / "out.txt"
    settings: dict[str, Any] = {"max_ongoing_requests": 4, "max_queued_requests": 4}
    with serving(random_model, out, free_port(), **settings) as (client, process):
        yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 0
        lines = [line for line in out.read_text().splitlines() if line.strip()]
        assert len(lines) == 3, lines  # where, how, and the farewell; nothing of Ray's
        assert lines[1].strip().startswith("curl -N http://")


def complete(server: httpx.Client, **fields: Any) -> dict[str, Any]:
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    response = server.post(path, json={**FAST, **fields})
    assert response.status_code == 200, response.text
    reply = response.json()
    for choice in reply["choices"]:
        assert not any(token in text_of(choice) for token in SPECIAL_TOKENS)
    return reply


def text_of(choice: dict[str, Any]) -> str:
    return choice["message"]["content"] if "message" in choice else choice["text"]


def stream(server: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed reply, which must end as OpenAI's do."""
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    with server.stream("POST", path, json={**FAST, **fields, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("event: draft\n").removeprefix("data: ")) for event in events[:-2]]


def metric(server: httpx.Client, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(server.get("/metrics").text)
    return sum(
        s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()
    )


@pytest.mark.integration
class TestServe:
    def test_the_small_routes(self, server: httpx.Client) -> None:
        models = server.get("/v1/models").json()
        assert [model["id"] for model in models["data"]] == ["tiny"]
        assert server.get("/v1/models/tiny").json() == models["data"][0]
        assert server.get("/health").json() == {"status": "ok"}
        page = server.get("/").text
        assert "<title>" in page
        assert "http://" not in page  # self-contained
        assert "https://" not in page

    @pytest.mark.parametrize(
        "fields",
        [
            {"prompt": "The cat"},
            {"prompt": "The cat", "max_tokens": 7},
            {"prompt": "The", "threshold": 0.02, "temperature": 0},
            {"prompt": "One", "remasking": "ancestral", "steps": 6},
            {"prompt": "One", "steps": 5, "cfg_scale": 1.0},
            {"prompt": ["The", "One"], "n": 2, "echo": True},
            {"prompt": "The cat", "suffix": " mat."},
            {"messages": CHAT},
            {"messages": CHAT, "n": 2},
        ],
        ids=str,
    )
    def test_a_stream_adds_up_to_the_whole(self, server: httpx.Client, fields: dict[str, Any]) -> None:
        whole = complete(server, **fields)
        chunks = stream(server, **fields, stream_options={"include_usage": True})
        texts: dict[int, str] = {}
        reasons: dict[int, str] = {}
        for chunk in chunks[:-1]:
            (choice,) = chunk["choices"]
            part = choice["delta"].get("content", "") if "messages" in fields else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + part
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
            assert chunk["usage"] is None
        assert [texts[c["index"]] for c in whole["choices"]] == [text_of(c) for c in whole["choices"]]
        assert [reasons[c["index"]] for c in whole["choices"]] == [
            c["finish_reason"] for c in whole["choices"]
        ]
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
        assert chunks[-1]["denoising"] == whole["denoising"]
        assert len({chunk["id"] for chunk in chunks}) == 1

    def test_chat_chunks_are_openais(self, server: httpx.Client) -> None:
        chunks = stream(server, messages=CHAT)
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert chunks[-1]["choices"][0]["delta"] == {}
        assert "usage" not in chunks[-1]
        assert complete(server, messages=CHAT)["object"] == "chat.completion"

    def test_drafts_are_for_those_who_ask(self, server: httpx.Client) -> None:
        """A client that knows nothing of them reads chunks without text."""
        plain = stream(server, messages=CHAT)
        chunks = stream(server, messages=CHAT, stream_options={"include_drafts": True}, include_trace=True)
        drafts = [chunk.pop("draft") for chunk in chunks if "draft" in chunk]
        assert drafts
        assert None in drafts[0]["tokens"]

        def texts(chunks: list[dict[str, Any]]) -> str:
            return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)

        assert texts(chunks) == texts(plain) == "".join(drafts[-1]["tokens"])
        trace = chunks[-1]["choices"][0]["trace"]
        assert trace["steps"] == drafts[-1]["steps"]
        assert trace["confidences"] == drafts[-1]["confidences"]

    def test_usage(self, server: httpx.Client, random_model: Path) -> None:
        prompt = len(encode_texts(load_tokenizer(random_model), ["The cat sat"])[0])
        reply = complete(server, prompt="The cat sat", n=3)
        assert [c["finish_reason"] for c in reply["choices"]] == ["length"] * 3
        assert reply["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": 60,
            "total_tokens": 60 + prompt,
        }
        assert reply["denoising"] == {"forwards": 60, "tokens_per_forward": 1.0}

    def test_choices_differ_and_the_first_is_the_single_one(self, server: httpx.Client) -> None:
        several = complete(server, prompt=["Go", "The cat"], n=2)["choices"]
        assert [c["index"] for c in several] == [0, 1, 2, 3]
        assert len({c["text"] for c in several}) == 4
        assert complete(server, prompt="The cat")["choices"][0]["text"] == several[2]["text"]

    def test_token_ids_are_the_text(self, server: httpx.Client, random_model: Path) -> None:
        ids = encode_texts(load_tokenizer(random_model), ["The cat sat"])[0]
        by_ids, by_text = (
            complete(server, prompt=ids, echo=True),
            complete(server, prompt="The cat sat", echo=True),
        )
        assert by_ids["choices"] == by_text["choices"]

    def test_stop_strings(self, server: httpx.Client) -> None:
        text = complete(server, prompt="The cat")["choices"][0]["text"]
        stop = text[8:10]
        reply = complete(server, prompt="The cat", stop=["never there", stop])
        assert reply["choices"][0]["text"] == text[: text.find(stop)]
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert reply["usage"]["completion_tokens"] < 20

    def test_infilling_keeps_the_prompt_and_counts_the_suffix(self, server: httpx.Client) -> None:
        plain = complete(server, prompt="The cat", echo=True)
        filled = complete(server, prompt="The cat", suffix=" on the mat.", echo=True)
        assert filled["choices"][0]["text"].startswith("The cat")
        assert filled["choices"][0]["text"] != plain["choices"][0]["text"]
        assert filled["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
        assert filled["usage"]["completion_tokens"] == 20

    def test_the_same_seed_gives_the_same_text_under_load(self, server: httpx.Client) -> None:
        def ask(seed: int) -> str:
            return complete(server, prompt="The dog", seed=seed)["choices"][0]["text"]

        alone = [ask(seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, range(4))) == alone
        assert len(set(alone)) == 4

    def test_refusals_have_openais_form(self, server: httpx.Client) -> None:
        for body, status, code in [
            ({**FAST, "prompt": "Go", "logit_bias": {"5": 1}}, 400, "unsupported_parameter"),
            ({**FAST, "prompt": "Go", "model": "gpt-4"}, 404, "model_not_found"),
            ({**FAST, "prompt": "Go", "max_tokens": CONTEXT, "stream": True}, 400, "context_length_exceeded"),
        ]:
            response = server.post("/v1/completions", json=body)
            assert response.status_code == status
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["code"] == code

    def test_what_readme_shows_of_it(self, server: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("openai", reason="needs the package openai")
        (block,) = re.findall(r"```py\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
        exec(compile(block.replace("http://localhost:8000", str(server.base_url)), "README.md", "exec"), {})
        assert capsys.readouterr().out.strip()

    @pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
    def test_the_curl_line_that_readme_shows(self, server: httpx.Client) -> None:
        (line,) = re.findall(r"```bash\n(curl .*)\n```", (REPOSITORY / "README.md").read_text())
        here = line.replace("localhost:8000", str(server.base_url).rstrip("/"))
        assert here != line
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=120, check=True)
        *events, last, end = done.stdout.split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    def test_openais_own_client(self, server: httpx.Client) -> None:
        openai = pytest.importorskip("openai", reason="needs the package openai")
        client = openai.OpenAI(base_url=f"{server.base_url}/v1/", api_key="none", max_retries=0, timeout=60)
        turns = [{"role": "system", "content": "Be brief.", "name": "host"}, *CHAT]
        knobs = {"block_length": 8, "temperature": 1.0}
        asked: dict[str, Any] = {"model": "tiny", "messages": turns, "max_completion_tokens": 12, "seed": 3}
        labels = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k"}
        whole = client.chat.completions.create(**asked, **labels, extra_body=knobs)
        assert whole.system_fingerprint.startswith("fp_")
        chunks = list(
            client.chat.completions.create(
                **asked, extra_body=knobs, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content != ""
        assert chunks[-1].usage == whole.usage
        assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
        answer = whole.choices[0].message.model_dump()  # sent back as history, with all its empty fields
        again = [*turns, answer, {"role": "tool", "tool_call_id": "call_1", "content": "4"}]
        assert client.chat.completions.create(**{**asked, "messages": again}).choices
        assert client.completions.create(model="tiny", prompt="Go", max_tokens=4).choices
        assert [model.id for model in client.models.list()] == ["tiny"]
        for error, fields in [
            (openai.BadRequestError, {"presence_penalty": 0.5}),
            (openai.BadRequestError, {"stop": "text<|eot_id|>"}),
            (openai.NotFoundError, {"model": "gpt-4"}),
            (openai.APIStatusError, {"messages": [{"role": "user", "content": "x" * 5_000_000}]}),
        ]:
            with pytest.raises(error) as caught:
                client.chat.completions.create(**asked | fields)
            assert caught.value.body["message"]
        assert caught.value.status_code == 413

    def test_what_clients_do_to_sockets(self, server: httpx.Client) -> None:
        """A body in chunks without end, one that stops short, a time limit of the client's, and bytes that are no text."""
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

        def ask(headers: str, *parts: bytes) -> tuple[int, dict[str, Any]]:
            with socket.create_connection((server.base_url.host, server.base_url.port), timeout=60) as client:
                client.sendall((head + headers + "\r\n").encode())
                with contextlib.suppress(OSError):  # the server need not read it all
                    for part in parts:
                        client.sendall(part)
                answer = http.client.HTTPResponse(client)
                answer.begin()
                return answer.status, json.loads(answer.read())["error"]

        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        assert ask("Transfer-Encoding: chunked\r\n", *[chunk] * 400)[1]["code"] == "body_too_large"
        assert ask("Content-Length: 99999999\r\n")[0] == 413
        status, error = ask("Content-Length: 50\r\nX-Request-Timeout-Seconds: 1\r\n", b"{")
        assert (status, error["type"]) == (408, "timeout_error")
        body = json.dumps({**FAST, "prompt": "Go", "max_tokens": 1900}).encode()
        status, error = ask(f"Content-Length: {len(body)}\r\nX-Request-Timeout-Seconds: 1\r\n", body)
        assert (status, error["type"]) == (408, "timeout_error")
        raw = b'{"prompt": "\xed\xa0\x80"}'
        assert ask(f"Content-Length: {len(raw)}\r\n", raw)[0] == 400
        failed = metric(server, "llada_requests_total", status="500")
        gone = metric(server, "llada_requests_total", status="499")
        deadline, stay_s = time.monotonic() + 120, 0.2
        while metric(server, "llada_requests_total", status="499") == gone:
            assert time.monotonic() < deadline
            with socket.create_connection((server.base_url.host, server.base_url.port)) as client:
                client.sendall((head + "Content-Length: 50\r\n\r\n{").encode())
                time.sleep(stay_s)  # who leaves before it is there was never there
            stay_s *= 1.5
        assert metric(server, "llada_requests_total", status="500") == failed

    def test_disconnecting_frees_the_engine(self, server: httpx.Client) -> None:
        """Four streams fill the replica; when their readers leave, a short one gets through, and they are given up."""
        given_up = metric(server, "llada_cancelled_replies_total")
        with contextlib.ExitStack() as stack:
            readers = []
            for _ in range(4):
                request = server.stream("POST", "/v1/completions", json={**FAST, **LONG})
                readers.append(stack.enter_context(request).iter_lines())
                next(readers[-1])
            assert metric(server, "llada_requests_running") == 4
        complete(server, prompt="The cat", max_tokens=4)
        deadline = time.monotonic() + 120
        # By the engine's own account, which comes every few seconds.
        while (
            metric(server, "llada_requests_running")
            or metric(server, "llada_cancelled_replies_total") < given_up + 4
        ):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert metric(server, "llada_requests_total", status="499") >= 4

    def test_a_full_queue_refuses_and_the_gateway_still_answers(self, server: httpx.Client) -> None:
        """Four are worked on and four wait; they come one after the other, as Ray holds a limit only roughly in a burst."""

        async def fill_and_ask() -> tuple[httpx.Response, httpx.Response]:
            async with httpx.AsyncClient(base_url=server.base_url, timeout=180) as client:

                async def read() -> None:
                    async with client.stream("POST", "/v1/completions", json={**FAST, **LONG}) as response:
                        assert response.status_code == 200
                        async for _ in response.aiter_lines():
                            pass

                def is_there(count: int) -> bool:
                    running = metric(server, "llada_requests_running")
                    return running + metric(server, "llada_requests_queued") == count

                readers = []
                for count in range(1, 9):
                    readers.append(asyncio.create_task(read()))
                    while not await asyncio.to_thread(is_there, count):
                        assert not any(reader.done() for reader in readers)
                        await asyncio.sleep(0.05)
                answers = (
                    await client.post("/v1/completions", json={**FAST, **LONG}),
                    await client.get("/health"),
                )
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)
                return answers

        refused, health = asyncio.run(asyncio.wait_for(fill_and_ask(), 180))
        assert health.status_code == 200
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        deadline = time.monotonic() + 120
        while metric(server, "llada_requests_running") or metric(server, "llada_requests_queued"):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def test_metrics_count(self, server: httpx.Client) -> None:
        before = {
            name: metric(server, f"llada_{name}_total")
            for name in ("prompt_tokens", "completion_tokens", "forwards")
        }
        done = metric(server, "llada_requests_total", route="/v1/completions", status="200")
        latencies = metric(server, "llada_request_seconds_count", route="/v1/completions")
        usage = complete(server, prompt="The cat", steps=10)
        assert (
            metric(server, "llada_prompt_tokens_total") - before["prompt_tokens"]
            == usage["usage"]["prompt_tokens"]
        )
        assert metric(server, "llada_completion_tokens_total") - before["completion_tokens"] == 20
        assert metric(server, "llada_forwards_total") - before["forwards"] == usage["denoising"]["forwards"]
        assert metric(server, "llada_requests_total", route="/v1/completions", status="200") == done + 1
        assert metric(server, "llada_request_seconds_count", route="/v1/completions") == latencies + 1


@pytest.fixture(scope="class")
def own_serve(local_ray: Path) -> Iterator[ClusterConfig]:
    """A Ray that goes on when `serve` ends; its Serve is taken down after the tests."""
    import ray.serve

    yield ClusterConfig()
    ray.serve.shutdown()


@pytest.mark.integration
class TestStarting:
    def test_an_interrupted_start_leaves_nothing_behind(
        self, own_serve: ClusterConfig, random_model: Path, free_port: Callable[[], int]
    ) -> None:
        from ray import serve as ray_serve

        is_over = threading.Event()

        def interrupt_while_deploying() -> None:
            while not is_over.wait(0.05):
                with contextlib.suppress(Exception):
                    if ray_serve.status().applications[APP_NAME].status == "DEPLOYING":
                        os.kill(os.getpid(), signal.SIGTERM)
                        return

        interrupter = threading.Thread(target=interrupt_while_deploying)
        interrupter.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                serve(ServeArgs(str(random_model), port=free_port()), own_serve, blocking=False)
        finally:
            is_over.set()
            interrupter.join()
        assert APP_NAME not in ray_serve.status().applications

    def test_a_replica_that_cannot_load_the_model_is_one_line(
        self, own_serve: ClusterConfig, random_model: Path, free_port: Callable[[], int]
    ) -> None:
        from ray import serve as ray_serve

        with pytest.raises(UserError) as caught:
            serve(ServeArgs(str(random_model), port=free_port(), device="cuda:99"), own_serve)
        assert str(caught.value).startswith(f"the endpoint did not start: cannot serve {random_model}: ")
        assert "there is no device 'cuda:99' here" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert APP_NAME not in ray_serve.status().applications

    def test_what_can_never_start_is_refused_at_once(
        self, own_serve: ClusterConfig, random_model: Path, free_port: Callable[[], int]
    ) -> None:
        many: list[dict[str, Any]] = [
            {"cpus_per_replica": 3},
            {"min_replicas": 3, "max_replicas": 3},
            {"gpus_per_replica": 1},
        ]
        for args in many:
            with pytest.raises(UserError, match=r"no room for . × .* \(min_replicas\)"):
                serve(ServeArgs(str(random_model), port=free_port(), **args), own_serve, blocking=False)

    def test_an_endpoint_that_waits_for_room_says_so(
        self,
        own_serve: ClusterConfig,
        random_model: Path,
        caplog: pytest.LogCaptureFixture,
        free_port: Callable[[], int],
    ) -> None:
        import ray
        from ray import serve as ray_serve

        @ray.remote(num_cpus=2)
        class Other:
            def wait(self) -> None:
                """Until it runs."""

        other = Other.remote()
        ray.get(other.wait.remote())

        def end_other_when_told() -> None:
            while "the endpoint waits: Deployment 'Denoiser'" not in caplog.text and not is_over.wait(0.2):
                pass
            ray.kill(other)

        is_over = threading.Event()
        listener = threading.Thread(target=end_other_when_told)
        listener.start()
        try:
            serve(ServeArgs(str(random_model), port=free_port()), own_serve, blocking=False)
        finally:
            is_over.set()
            listener.join()
        ray_serve.delete(APP_NAME)
        assert "to be scheduled" in caplog.text


@pytest.mark.integration
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interruption_while_ray_starts_is_one_line(
    random_model: Path, tmp_path: Path, free_port: Callable[[], int], number: int, code: int
) -> None:
    """Whatever handlers Ray has set by then."""

    def default() -> None:  # whoever runs the tests may ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    command = [
        sys.executable,
        "-m",
        "pipelines.serve",
        "--model",
        str(random_model),
        "--port",
        str(free_port()),
    ]
    with (tmp_path / "out.txt").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=REPOSITORY, preexec_fn=default)
    try:
        started: list[str] = []
        while "gcs_server" not in started:
            assert process.poll() is None, (tmp_path / "out.txt").read_text()
            time.sleep(0.05)
            with contextlib.suppress(psutil.Error):  # one has ended meanwhile
                started = [each.name() for each in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(number)
        assert process.wait(120) == code
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "out.txt").read_text() == "llada serve: interrupted\n"


Endpoint = tuple[httpx.Client, subprocess.Popen[bytes]]


@pytest.mark.integration
@pytest.mark.timeout(600)
class TestDeaths:
    """Of an endpoint's processes while it is asked, in their order."""

    @pytest.fixture(scope="class")
    def endpoint(
        self, random_model: Path, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
    ) -> Iterator[Endpoint]:
        settings: dict[str, Any] = {"max_ongoing_requests": 2, "graceful_shutdown_timeout_s": 12}
        out = tmp_path_factory.mktemp("deaths") / "out.txt"
        with serving(random_model, out, free_port(), **settings) as made:
            yield made

    def test_of_the_replica_and_of_the_gateway(
        self, endpoint: Endpoint, load_on: Any, replicas_of: Callable[..., list[psutil.Process]]
    ) -> None:
        """Each the only one of its kind, killed: a request is answered once and with its text, or ends with an error that says to
        come again, those aside which the gateway had in hand; none hangs, and the port answers on."""
        client, process = endpoint
        load = load_on(str(client.base_url), clients=4)

        async def kill(deployment: str, may_be: set[str]) -> None:
            await load.answered(4)
            (killed,) = replicas_of(deployment, process.pid)
            killed.kill()
            await load.answered(8)  # more than were on their way
            assert load.outcomes.keys() <= {"ok", *may_be}
            load.outcomes.clear()

        async def kill_both() -> None:
            async with load.running():
                await kill("Denoiser", {"503 retry", "broken service_unavailable_error"})
                await kill("Gateway", {"lost"})
                await load.answered(4)

        asyncio.run(kill_both())
        assert load.outcomes.keys() == {"ok"}
        assert load.texts
        assert all(len(texts) == 1 for texts in load.texts.values())

    def test_of_the_endpoint(self, endpoint: Endpoint) -> None:
        """SIGTERM with two requests running, two waiting and more to come: nobody hangs, and nobody is told 404."""
        client, process = endpoint

        async def take_down() -> tuple[
            list[dict[str, Any]], httpx.Response, list[httpx.Response], list[httpx.Response]
        ]:
            nearly = asyncio.Event()
            limits = httpx.Limits(max_keepalive_connections=0)
            async with httpx.AsyncClient(base_url=client.base_url, timeout=120, limits=limits) as requests:

                def ask(**fields: Any) -> asyncio.Task[httpx.Response]:
                    body = {**FAST, "prompt": "Go", **fields}
                    return asyncio.create_task(requests.post("/v1/completions", json=body))

                async def finish() -> list[dict[str, Any]]:
                    """The chunks of a shorter one, which must come to its end in the time that is given."""
                    drafts = {"stream_options": {"include_drafts": True}}
                    body, chunks = {**FAST, **LONG, **drafts, "max_tokens": 400}, []
                    async with requests.stream("POST", "/v1/completions", json=body) as answer:
                        async for line in answer.aiter_lines():
                            if line.startswith("data: {"):
                                chunks.append(json.loads(line.removeprefix("data: ")))
                                if chunks[-1].get("draft", {}).get("forwards", 0) > 340:
                                    nearly.set()
                    return chunks

                # Tokens are shared out fairly: the shorter one takes some seconds beside the longer.
                short, long = asyncio.create_task(finish()), ask(**LONG, cfg_scale=1.0, n=8)
                while await asyncio.to_thread(metric, client, "llada_requests_running") < 2:
                    await asyncio.sleep(0.1)
                waiting = [ask(), ask(stream=True)]
                while await asyncio.to_thread(metric, client, "llada_requests_queued") < 2:
                    await asyncio.sleep(0.1)
                await nearly.wait()
                process.send_signal(signal.SIGTERM)
                refused = list(await asyncio.gather(*waiting))
                assert not long.done()
                coming: list[httpx.Response] = []
                with contextlib.suppress(httpx.TransportError):  # in the end nobody listens
                    while not long.done():
                        coming += [await ask(max_tokens=2), await requests.get("/health")]
                        await asyncio.sleep(0.2)
                return await short, await long, refused, coming

        short, long, refused, coming = asyncio.run(asyncio.wait_for(take_down(), 150))
        assert process.wait(120) == 0
        assert short[-1]["choices"][0]["finish_reason"] == "length"
        *_, cut, done, _ = long.text.split("\n\n")  # it would have run for longer than the time that is given
        assert json.loads(cut.removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
        assert done == "data: [DONE]"
        for response in refused:
            assert (response.status_code, response.headers["retry-after"].isdecimal()) == (503, True)
            assert "taken down" in response.json()["error"]["message"]
        assert {response.status_code for response in coming} == {503}
        assert {"status": "draining", "reason": "the endpoint is being taken down"} in [
            r.json() for r in coming
        ]


def make_bad(kind: str, good: Path, folder: Path) -> dict[str, Any]:
    """Settings of an endpoint that cannot start."""
    if kind == "missing":
        return {"model": str(folder)}
    if kind == "device":
        return {"model": str(good), "device": "cuda:99"}
    shutil.copytree(good, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "altered":
        files = {weights.name: {"bytes": weights.stat().st_size, "sha256": sha256(str(weights))}}
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"d_model": 48}))
    return {"model": str(folder)}


@pytest.mark.timeout(900)
class TestRedeploying:
    """`serve deploy` on a Serve that runs already."""

    @pytest.fixture(scope="class")
    def deploy(self, own_serve: ClusterConfig, free_port: Callable[[], int]) -> Callable[..., str]:
        """deploy(url, **args) waits for the end of it and returns the application's status."""
        from ray import serve as ray_serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        port = free_port()
        ray_serve.start(http_options={"port": port})

        def deploy(**args: Any) -> str:
            application = {
                "name": APP_NAME,
                "import_path": "pipelines.serve:build_app",
                "runtime_env": {"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
                "args": {"model_id": "tiny", "max_ongoing_requests": 2, **args},
            }
            client = _get_global_client()
            assert client is not None
            client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
            deadline = time.monotonic() + 300
            while (status := ray_serve.status().applications[APP_NAME]).status not in (
                "RUNNING",
                "DEPLOY_FAILED",
            ):
                assert time.monotonic() < deadline, status
                time.sleep(0.2)
            return f"{status.status.value}: {status.message}"

        self.__class__.url = f"http://127.0.0.1:{port}"
        return deploy

    url: ClassVar[str]

    @staticmethod
    def again(model: Path) -> dict[str, Any]:
        """Other settings than the first version's. Where they run already, Serve has nothing to do."""
        return {"model": str(model), "max_ongoing_requests": 1, "graceful_shutdown_timeout_s": 5}

    @pytest.mark.parametrize(
        "kinds",
        [
            ("altered",),
            pytest.param(("device",), marks=pytest.mark.slow),
            # Where the application is built they are refused as the one above; without Serve, they all are below.
            pytest.param(("missing", "cut", "config"), marks=pytest.mark.slow),
        ],
        ids=",".join,
    )
    def test_a_bad_one_leaves_the_old_version_answering(
        self, deploy: Callable[..., str], random_model: Path, tmp_path: Path, kinds: tuple[str, ...]
    ) -> None:
        assert deploy(model=str(random_model)).startswith("RUNNING")
        answers: list[httpx.Response] = []
        is_over = threading.Event()

        def keep_asking() -> None:
            with httpx.Client(base_url=self.url, timeout=180) as client:
                while not is_over.wait(0.1):
                    body = {**FAST, "prompt": "Go", "max_tokens": 4}
                    answers.extend([client.post("/v1/completions", json=body), client.get("/health")])

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            for kind in kinds:
                status = deploy(**make_bad(kind, random_model, tmp_path / kind))
                assert status.startswith("DEPLOY_FAILED"), (kind, status)
                if kind != "device":  # known only where the replica runs
                    assert f"cannot serve {tmp_path / kind}: " in status
                seen, deadline = len(answers), time.monotonic() + 180
                while len(answers) < seen + 3:  # one pair was asked for after it had failed
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            assert deploy(**self.again(random_model)).startswith("RUNNING")
        finally:
            is_over.set()
            asking.join()
        assert [(a.status_code, a.text) for a in answers if a.status_code != 200] == []

    @pytest.mark.slow
    def test_one_request_of_many_replies_is_more_work_than_one(
        self, deploy: Callable[..., str], random_model: Path
    ) -> None:
        from ray import serve as ray_serve

        scaling = {
            "max_replicas": 2,
            "target_ongoing_requests": 2,
            "upscale_delay_s": 0,
            "cpus_per_replica": 0,
        }
        assert deploy(model=str(random_model), **scaling).startswith("RUNNING")
        with httpx.stream(
            "POST",
            f"{self.url}/v1/completions",
            json={**LONG, "prompt": "Go", "n": 8, "stream": True},
            timeout=60,
        ) as running:
            lines = running.iter_lines()
            assert next(lines)
            deadline = time.monotonic() + 120
            while (
                sum(ray_serve.status().applications[APP_NAME].deployments["Denoiser"].replica_states.values())
                < 2
            ):
                assert time.monotonic() < deadline
                time.sleep(0.5)

    def test_the_dashboard_shows_what_there_is(
        self,
        deploy: Callable[..., str],
        random_model: Path,
        metrics_shown: Callable[[str], set[str]],
        scrape: Callable[..., dict[str, float]],
    ) -> None:
        deploy(**self.again(random_model))
        with httpx.Client(base_url=self.url, timeout=60) as client:
            assert client.post("/v1/completions", json={**FAST, "prompt": "Go"}).status_code == 200
        shown = metrics_shown("ray_serve_")
        assert len(shown) >= 3
        scrape(*shown)  # waits until they are all there

    def test_deleting_it_refuses_what_waits(self, deploy: Callable[..., str], random_model: Path) -> None:
        from ray import serve as ray_serve

        deploy(**self.again(random_model))
        body = {**FAST, **LONG, "n": 16}  # not over before the gateway has noticed
        with (
            httpx.Client(base_url=self.url, timeout=180) as client,
            ThreadPoolExecutor(1) as pool,
            client.stream("POST", "/v1/completions", json=body) as running,
        ):
            lines = running.iter_lines()  # held: httpx hangs up when it is thrown away
            next(lines)
            waiting = pool.submit(client.post, "/v1/completions", json={**FAST, "prompt": "Go"})
            while metric(client, "llada_requests_queued") < 1:
                assert not waiting.done(), waiting.result().text
                time.sleep(0.1)
            ray_serve.delete(APP_NAME, _blocking=False)
            response = waiting.result(120)
        assert response.status_code == 503, response.text
        assert response.headers["retry-after"].isdecimal()


# --- Configuration ----------------------------------------------------------------------------------------------------


def test_scaling_and_limits_reach_serve() -> None:
    args = ServeArgs(
        "s3://models/tiny/",
        min_replicas=0,
        max_replicas=6,
        target_ongoing_requests=3,
        max_ongoing_requests=5,
        max_queued_requests=11,
        cpus_per_replica=2,
        gpus_per_replica=0.5,
    )
    gateway, denoiser = build_deployments(args)
    scaling = denoiser._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (0, 6, 3)
    assert (denoiser.max_ongoing_requests, denoiser.max_queued_requests) == (5, -1)  # the gateway counts
    assert denoiser.ray_actor_options["num_gpus"] == 0.5
    assert denoiser._deployment_config.graceful_shutdown_timeout_s == 120
    assert (gateway.num_replicas, gateway.ray_actor_options["num_cpus"]) == (1, 0)
    assert args.name == "tiny"


@pytest.mark.parametrize("limit, aim", [(1, 0.5), (2, 1), (8, 4), (30, 15)])
def test_what_autoscaling_aims_at_follows_the_limit(limit: int, aim: float) -> None:
    args = ServeArgs("m", max_ongoing_requests=limit)
    _, denoiser = build_deployments(args)
    assert denoiser._deployment_config.autoscaling_config.target_ongoing_requests == aim
    assert denoiser.max_ongoing_requests == limit


@pytest.mark.parametrize("aim, limit", [(0.5, 8), (4, 8), (4.2, 9), (12, 24)])
def test_the_limit_follows_what_autoscaling_aims_at(aim: float, limit: int) -> None:
    """Either may be given alone."""
    args = ServeArgs("m", target_ongoing_requests=aim)
    _, denoiser = build_deployments(args)
    assert denoiser._deployment_config.autoscaling_config.target_ongoing_requests == aim
    assert denoiser.max_ongoing_requests == limit


def test_a_redeploy_starts_beside_the_old_version() -> None:
    for deployment in build_deployments(ServeArgs("m")):
        assert deployment._deployment_config.max_surge_percent == 100
    gateway, denoiser = build_deployments(ServeArgs("m", max_surge_percent=0))
    assert gateway._deployment_config.max_surge_percent == 100  # it takes no resources
    assert denoiser._deployment_config.max_surge_percent == 0


@pytest.mark.parametrize("kind", ["missing", "cut", "altered", "config"])
def test_what_cannot_be_served_is_said_where_the_application_is_built(
    random_model: Path, tmp_path: Path, kind: str
) -> None:
    args = make_bad(kind, random_model, tmp_path / kind)
    with pytest.raises(UserError, match=f"cannot serve {args['model']}: "):
        build_app(ServeArgs(**args))
    # From a Serve file: what Serve shows as one line, and does not try again.
    with pytest.raises(RayServeException, match=f"^cannot serve {args['model']}: "):
        build_app(args)
    with pytest.raises(RayServeException, match="^unknown setting modell"):
        build_app({"modell": "m"})


def test_what_cannot_be_served_is_said_before_ray_starts(tmp_path: Path, random_model: Path) -> None:
    with pytest.raises(UserError, match="no folder at"):
        serve(ServeArgs(str(tmp_path / "none")), ClusterConfig())
    with pytest.raises(UserError, match=r"config\.json"):
        serve(ServeArgs(str(tmp_path)), ClusterConfig())
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match="choose another --port"),
    ):
        serve(ServeArgs(str(random_model), port=taken.getsockname()[1]), ClusterConfig())


@pytest.fixture(scope="module")
def serve_config() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "ray_configs" / "serve.yaml").read_text())


def test_the_limits_of_the_serve_config_arrive(serve_config: dict[str, Any], random_model: Path) -> None:
    """As Ray builds it on the cluster. (Whether the file is good: tests/pipelines/test_check.py.)"""
    (application,) = serve_config["applications"]
    args = application["args"] | {"model": str(random_model)}
    gateway = build_app(args)._bound_deployment
    denoiser = gateway.init_args[0][0].stable._bound_deployment
    assert denoiser.max_ongoing_requests == args["max_ongoing_requests"]
    admission, default_tokens = gateway.init_args[1](), gateway.init_args[2]
    assert (admission._max_queued, admission._per_replica) == (
        args["max_queued_requests"],
        args["max_ongoing_requests"],
    )
    assert default_tokens == 128
    options = denoiser._deployment_config
    assert options.graceful_shutdown_timeout_s == args["graceful_shutdown_timeout_s"]
    assert options.max_surge_percent == args["max_surge_percent"]
    assert gateway.init_args[3] == RequestLimits(args["max_body_bytes"], args["request_timeout_s"])
    for name in (
        "min_replicas",
        "max_replicas",
        "target_ongoing_requests",
        "upscale_delay_s",
        "downscale_delay_s",
    ):
        assert getattr(options.autoscaling_config, name) == args[name]
    assert denoiser.ray_actor_options == {
        "num_cpus": args["cpus_per_replica"],
        "num_gpus": args["gpus_per_replica"],
    }
    sampling = denoiser.init_args[1]
    assert sampling == SamplingConfig(gen_length=128, steps=None, block_length=32)
    assert denoiser.init_kwargs["max_concurrent"] == args["max_ongoing_requests"]


def test_a_bad_file_of_keys_is_said_where_the_application_is_built(
    random_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("short\n")
    with pytest.raises(UserError, match="keys, line 1: a key has at least 8 characters"):
        build_app(ServeArgs(str(random_model), api_keys=str(tmp_path / "keys")))


def test_what_is_said_of_requests_reaches_the_gateway(random_model: Path, tmp_path: Path) -> None:
    """And the keys themselves do not: Ray stores what a deployment is made with."""
    (tmp_path / "keys").write_text("sk-secret-key\n")
    said: dict[str, Any] = {
        "max_choices": 3,
        "max_messages": 4,
        "max_body_bytes": 2048,
        "request_timeout_s": 7.0,
    }
    said |= {"key_requests_per_minute": 5.0, "key_tokens_per_minute": 6.0, "log_prompts": True}
    said |= {"cors_origins": ("https://a.org",), "max_prompt_tokens": 8, "api_keys": str(tmp_path / "keys")}
    gateway = build_app(ServeArgs(str(random_model), **said))._bound_deployment
    (model,), _, _, limits, access, keys = gateway.init_args
    assert limits == RequestLimits(2048, 7.0, choices=3, messages=4)
    assert access == Access((), KeyLimits(5.0, 6.0), ("https://a.org",), logs_prompts=True, echoes_id=False)
    assert keys == said["api_keys"]
    assert model.stable._bound_deployment.init_kwargs["max_prompt_tokens"] == 8


def test_each_model_has_a_deployment_and_requests_know_their_names(
    random_model: Path, tmp_path: Path
) -> None:
    other, new = tmp_path / "other", tmp_path / random_model.name
    for folder in (other, new):
        shutil.copytree(random_model, folder)
    args = ServeArgs(str(random_model), more_models=(f"b={other}",), canary=str(new), canary_share=0.1)
    gateway = build_app(args)._bound_deployment
    first, second = gateway.init_args[0]
    assert (first.name, first.canary_share, second.name, second.canary) == ("tiny", 0.1, "b", None)
    bound = [one._bound_deployment for one in (first.stable, first.canary, second.stable)]
    assert [one.name for one in bound] == ["Denoiser", "Denoiser_canary", "Denoiser-b"]
    assert [one.init_args[0] for one in bound] == [str(random_model), str(new), str(other)]
    assert [one.init_kwargs["version"] for one in bound] == ["tiny", "tiny-canary", "other"]
    with pytest.raises(UserError, match=f"cannot serve {tmp_path}/none: no folder"):
        build_app(ServeArgs(str(random_model), more_models=(f"b={tmp_path}/none",)))


def test_models_share_the_replicas_where_one_holds_several(random_model: Path, tmp_path: Path) -> None:
    """The canary has its own."""
    shutil.copytree(random_model, other := tmp_path / "other")
    args = ServeArgs(str(random_model), more_models=(f"b={other}",), canary=str(other), models_per_replica=2)
    gateway = build_app(args)._bound_deployment
    first, second = gateway.init_args[0]
    assert (first.name, second.name, second.canary) == ("tiny", "b", None)
    assert first.stable is second.stable
    shared, canary = first.stable._bound_deployment, first.canary._bound_deployment
    assert (shared.name, canary.name) == ("Denoiser", "Denoiser_canary")
    assert shared.func_or_class.__name__ == "MultiplexedDenoiser"
    assert shared.init_args[:2] == (
        {"tiny": Offered(str(random_model), "tiny"), "b": Offered(str(other), "other")},
        2,
    )
    assert canary.init_args[0] == str(other)
    assert shared.init_kwargs.keys() == canary.init_kwargs.keys() - {"version"}
