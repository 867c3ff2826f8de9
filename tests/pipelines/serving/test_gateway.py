"""What the front process loads, says of its health, and does when a replica dies. (Its way to the replicas is exercised over
HTTP in tests/pipelines/test_serve.py.)"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve import context
from ray.serve.schema import ApplicationStatus, DeploymentStatus, ReplicaState

from llada.sampling.events import Finished, Started, Text
from pipelines.serve import APP_NAME
from pipelines.serving import gateway
from pipelines.serving.access_log import RequestIds
from pipelines.serving.admission import Admission
from pipelines.serving.backend import Health
from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.dialects.calls import AnyBody, TokenizeBody
from pipelines.serving.dialects.completions import CompletionBody
from pipelines.serving.events import ReplicaEvent, Serving
from pipelines.serving.gateway import Gateway, Replicas, Served
from pipelines.serving.keys import KeyLimits
from pipelines.serving.limits import RequestLimits
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import Access, build_api

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_front_process_needs_no_torch() -> None:
    """It starts fast and stays small; the same holds for parsing a body."""
    code = (
        "import sys\n"
        "import pipelines.serving.gateway\n"
        "from pipelines.serving.dialects.parsing import parse_body\n"
        "from pipelines.serving.dialects.chat import ChatBody\n"
        'parse_body(ChatBody, b\'{"messages": [{"role": "user", "content": "x"}], "remasking": "random"}\')\n'
        "print(sorted({'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


class Handle:
    """As much of Ray's handle of a deployment as the gateway needs, over a model in this process. Its replicas die as Ray's
    do: so many lists of events after they have been asked."""

    app_name, deployment_name = APP_NAME, "Denoiser"

    def __init__(
        self,
        denoiser: Denoiser | None = None,
        deaths: Sequence[int] = (),
        error: BaseException | None = None,
    ) -> None:
        self.denoiser, self.deaths, self.error = denoiser, list(deaths), error or RayActorError()
        self.canaries = self.asked = 0
        self.models: list[str] = []
        """By which Serve chooses a replica."""
        self.answers_canaries = True
        self.batches, self.canary = _Call(self._batches), _Call(self._canary)

    def _init(self, **_: Any) -> None:
        """There is nothing to route."""

    def options(self, *, multiplexed_model_id: str | None = None, **_: Any) -> Handle:
        if multiplexed_model_id is not None:
            self.models.append(multiplexed_model_id)
        return self

    def _batches(self, body: SamplingBody, ids: RequestIds) -> _Response:
        assert self.denoiser is not None
        self.asked += 1
        last = self.deaths.pop(0) if self.deaths else None
        return _Response(self.denoiser.batches(body, ids), last, self.error)

    async def _canary(self) -> None:
        self.canaries += 1
        if not self.answers_canaries:
            raise TimeoutError


class _Call:
    def __init__(self, remote: Callable[..., Any]) -> None:
        self.remote = remote


class _Response:
    def __init__(
        self, batches: AsyncGenerator[list[ReplicaEvent], None], last: int | None, error: BaseException
    ) -> None:
        self._batches, self._left, self._error = batches, last, error

    def __aiter__(self) -> _Response:
        return self

    async def __anext__(self) -> list[ReplicaEvent]:
        if self._left == 0:
            await self._batches.aclose()
            raise self._error
        if self._left is not None:
            self._left -= 1
        return await anext(self._batches)

    def cancel(self) -> None:
        """What has died does nothing any more."""


def replicas_of(handle: Handle) -> Replicas:
    admission = Admission(max_queued=4, per_replica=2, retry_after_s=5)
    return Replicas(handle, admission, 8)  # type: ignore[arg-type]


class Controller:
    """Serve's own account, with the traceback that it keeps of a replica that did not start; None: it is busy."""

    def __init__(
        self,
        state: DeploymentStatus | None,
        *,
        running: int = 1,
        application: ApplicationStatus = ApplicationStatus.RUNNING,
    ) -> None:
        self.state, self.running, self.application = state, running, application
        self.asked = 0

    def get_serve_details(self) -> dict[str, Any]:
        self.asked += 1
        if self.state is None:
            raise TimeoutError("the controller is busy")
        message = (
            'Traceback (most recent call last):\n  File "/home/somebody/serve.py", line 3\nKeyError: secret'
        )
        replicas = [{"state": ReplicaState.RUNNING}] * self.running or [{"state": ReplicaState.STARTING}]
        denoiser = {"status": self.state, "message": message, "replicas": replicas}
        deployments = {Handle.deployment_name: denoiser}
        application = {"status": self.application, "message": message, "deployments": deployments}
        return {"applications": {APP_NAME: application}}


def ask_instead(monkeypatch: pytest.MonkeyPatch, controller: Controller) -> None:
    monkeypatch.setattr(context, "_get_global_client", lambda: controller)


@pytest.mark.parametrize(
    ("state", "running", "word"),
    [
        (DeploymentStatus.HEALTHY, 1, "ok"),
        (DeploymentStatus.HEALTHY, 0, "ok"),  # meant to have none now
        (DeploymentStatus.DOWNSCALING, 0, "ok"),
        (DeploymentStatus.UPSCALING, 0, "ok"),  # it wakes
        (DeploymentStatus.UPDATING, 1, "ok"),
        (DeploymentStatus.UPDATING, 0, "starting"),
        (DeploymentStatus.UNHEALTHY, 0, "unavailable"),
        (DeploymentStatus.DEPLOY_FAILED, 0, "unavailable"),
    ],
)
def test_health_is_a_word_and_a_reason_that_a_stranger_may_read(
    monkeypatch: pytest.MonkeyPatch, state: DeploymentStatus, running: int, word: str
) -> None:
    replicas = replicas_of(Handle())
    assert replicas.health().status == "starting"
    ask_instead(monkeypatch, Controller(state, running=running))
    asyncio.run(replicas.look())
    health = replicas.health()
    assert health.status == word
    assert (health.reason is None) == (word == "ok")
    assert not any(told in str(health.reason) for told in ("/", "Traceback", "secret", "\n"))


def test_asking_for_the_health_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's controller takes seconds when it is busy, and may be away: what was seen last stays."""
    controller = Controller(DeploymentStatus.HEALTHY)
    ask_instead(monkeypatch, controller)
    replicas = replicas_of(Handle())
    asyncio.run(replicas.look())
    assert [replicas.health() for _ in range(100)] == [Health("ok")] * 100
    assert controller.asked == 1
    controller.state = None
    asyncio.run(replicas.look())
    assert (controller.asked, replicas.health()) == (2, Health("ok"))
    controller.state, controller.application = DeploymentStatus.HEALTHY, ApplicationStatus.DELETING
    asyncio.run(replicas.look())
    assert replicas.health().status == "draining"


# --- A request of one token says whether the model answers ------------------------------------------------------------


def test_ready_is_only_what_answers_and_users_are_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_instead(monkeypatch, Controller(DeploymentStatus.HEALTHY))
    handle = Handle()
    replicas = replicas_of(handle)
    handle.answers_canaries = False
    asyncio.run(replicas.look())
    assert replicas.health().status == "unavailable"
    handle.answers_canaries = True
    asyncio.run(replicas.look())
    assert (replicas.health(), handle.canaries) == (Health("ok"), 2)
    asyncio.run(replicas.look())
    assert handle.canaries == 2  # what has been shown holds for a while
    monkeypatch.setattr(gateway, "_CANARY_EVERY_S", 0)
    asyncio.run(replicas.look())
    assert handle.canaries == 3


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([Serving("f", None, "1"), Started(0, 3)], "unavailable"),  # it is taken before it can fail
        ([Started(0, 3), Text(0, "an echo")], "unavailable"),
        ([Text(0, "a", (), 1)], "ok"),
        ([Finished(0, "stop", 3, 1, 1)], "ok"),
    ],
)
def test_what_was_written_for_a_user_is_proof_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, events: list[ReplicaEvent], status: str
) -> None:
    """Also while requests are open: a network that hangs answers none of them."""
    ask_instead(monkeypatch, Controller(DeploymentStatus.HEALTHY))
    monkeypatch.setattr(gateway, "_BUSY_S", 0)

    class Told:
        async def batches(self, *_: Any) -> AsyncGenerator[list[ReplicaEvent], None]:
            yield events

    handle = Handle(Told())  # type: ignore[arg-type]
    handle.answers_canaries = False
    replicas = replicas_of(handle)

    async def look() -> str:
        await replicas.look()
        async for _ in replicas._ask_replica(CompletionBody(prompt="x"), RequestIds("a")):
            pass
        replicas._open.add(object())  # type: ignore[arg-type]
        await replicas.look()
        return replicas.health().status

    assert asyncio.run(look()) == status


def test_a_model_that_has_been_let_go_is_not_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gateway.Replicas, "_ask", lambda self: Health("ok")
    )  # no replica was counted: there is to be none
    handle = Handle()
    replicas = replicas_of(handle)
    asyncio.run(replicas.look())
    assert (replicas.health(), handle.canaries) == (Health("ok"), 0)


def test_the_canary_is_a_request(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(denoiser.canary())
    monkeypatch.setattr(denoiser.engine, "_damage", "weights that are no numbers")
    with pytest.raises(FloatingPointError):
        asyncio.run(denoiser.canary())
    monkeypatch.setattr(denoiser.engine, "_failures", 0)


# --- A replica that dies ----------------------------------------------------------------------------------------------

FAST = {"prompt": "Go", "max_tokens": 8, "block_length": 4, "temperature": 1.0, "seed": 3}


def ask(handle: Handle, **fields: Any) -> tuple[httpx.Response, str]:
    async def send() -> tuple[httpx.Response, str]:
        transport = httpx.ASGITransport(build_api(replicas_of(handle), "tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/v1/completions", json={**FAST, **fields})
            return answer, (await client.get("/metrics")).text

    return asyncio.run(send())


def texts(answer: httpx.Response) -> dict[int, str]:
    """{choice: text} of a whole or streamed reply."""
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")] or [answer.text]
    found: dict[int, str] = {}
    for choice in (choice for line in lines for choice in json.loads(line)["choices"]):
        found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("died_after", [0, 1])
def test_who_has_no_byte_yet_does_not_see_it(denoiser: Denoiser, died_after: int, stream: bool) -> None:
    """Before the replica has said anything, or when it has begun."""
    expected, _ = ask(Handle(denoiser), stream=stream)
    answer, metrics = ask(Handle(denoiser, [died_after]), stream=stream)
    assert answer.status_code == 200
    assert texts(answer) == texts(expected)
    assert "llada_retries_total 1.0" in metrics
    assert "llada_requests_queued 0.0" in metrics
    assert "llada_requests_running 0.0" in metrics


@pytest.mark.parametrize("died_after", [1, 2])
def test_a_whole_reply_is_begun_anew_whenever_it_happens(denoiser: Denoiser, died_after: int) -> None:
    """Also when some of it has come."""
    expected, _ = ask(Handle(denoiser), n=2)
    answer, metrics = ask(Handle(denoiser, [died_after]), n=2)
    assert (answer.status_code, texts(answer)) == (200, texts(expected))
    assert answer.json()["usage"] == expected.json()["usage"]
    assert "llada_retries_total 1.0" in metrics


def rpc_error(code: StatusCode) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata())


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (ActorUnavailableError("unavailable", None), True),
        (rpc_error(StatusCode.UNAVAILABLE), True),
        (rpc_error(StatusCode.CANCELLED), True),
        (RuntimeError("Unexpected error (StatusCode.UNAVAILABLE): Socket closed."), True),
        (asyncio.CancelledError(), True),  # at the other end, not here
        (rpc_error(StatusCode.UNKNOWN), False),
        (rpc_error(StatusCode.RESOURCE_EXHAUSTED), False),  # another replica would find it as long
        (RuntimeError("the device is gone"), False),
    ],
    ids=repr,
)
def test_a_death_has_many_names(denoiser: Denoiser, error: BaseException, is_loss: bool) -> None:
    """Those of an actor and of a gRPC call; an error of the model's side is none."""
    answer, metrics = ask(Handle(denoiser, [1], error))
    assert answer.status_code == (200 if is_loss else 500)
    assert f"llada_retries_total {float(is_loss)}" in metrics


def test_a_stream_that_has_begun_breaks_off_and_nobody_is_tried_a_third_time(denoiser: Denoiser) -> None:
    answer, metrics = ask(Handle(denoiser, [2]), stream=True)
    *_, error, done, _ = answer.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
    assert done == "data: [DONE]"
    assert "llada_retries_total 0.0" in metrics
    answer, metrics = ask(Handle(denoiser, [1, 1]))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "llada_retries_total 1.0" in metrics


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_refuses_without_asking_anybody(denoiser: Denoiser, stream: bool) -> None:
    handle = Handle(denoiser)

    async def send() -> list[httpx.Response]:
        replicas = replicas_of(handle)
        places = [replicas._admission.enter(8) for _ in range(4)]
        transport = httpx.ASGITransport(build_api(replicas, "tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            refused = await client.post("/v1/completions", json={**FAST, "stream": stream})
            places[0].leave(is_done=False)
            return [refused, *[await client.post("/v1/completions", json=FAST) for _ in range(2)]]

    refused, *taken = asyncio.run(send())
    error = refused.json()["error"]
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert [one.status_code for one in taken] == [200, 200]  # each has left its place behind
    assert handle.asked == 2


@pytest.mark.parametrize("first, told", [(None, []), ("a", ["b", "a"])])
def test_where_replicas_hold_several_models_serve_is_told_which_is_wanted(
    denoiser: Denoiser, first: str | None, told: list[str]
) -> None:
    handle = Handle(denoiser)
    admission = Admission(max_queued=4, per_replica=2, retry_after_s=5)
    replicas = Replicas(handle, admission, 8, first)  # type: ignore[arg-type]

    async def read() -> None:
        for model in ("b", None):
            async for _ in replicas.stream(
                CompletionBody.model_validate({**FAST, "model": model}), RequestIds("x")
            ):
                pass

    asyncio.run(read())
    assert handle.asked == 2
    assert handle.models == told


def retry_after_of(denoiser: Denoiser, *bodies: AnyBody) -> list[int]:
    """What others are told, in seconds, while each of these, one after the other, waits, by a clock that goes on by a hundredth of
    a second whenever it is looked at."""
    clock = itertools.count(1000, 0.01)
    admission = Admission(max_queued=4, per_replica=2, retry_after_s=5, clock=lambda: next(clock))
    told: list[int] = []

    class Watching(Handle):
        def _batches(self, body: Any, ids: RequestIds) -> _Response:
            told.append(admission.retry_after_s())
            return super()._batches(body, ids)

    replicas = Replicas(Watching(denoiser), admission, 8, most_tokens=2048)  # type: ignore[arg-type]

    async def read() -> None:
        for body in bodies:
            async for _ in replicas.stream(body, RequestIds("x")):
                pass

    asyncio.run(read())
    return told


def test_who_asks_for_more_than_there_can_be_is_no_such_work(denoiser: Denoiser) -> None:
    """He waits for his refusal; meanwhile others are told when to come again."""
    reply, endless = (CompletionBody.model_validate({**FAST, "max_tokens": most}) for most in (20, 10**400))
    assert retry_after_of(denoiser, reply, reply, reply, endless)[-1] < 600


def test_a_question_to_the_tokenizer_is_no_work_that_others_wait_for(denoiser: Denoiser) -> None:
    reply = CompletionBody.model_validate(FAST)
    told = retry_after_of(denoiser, reply, reply, reply, TokenizeBody(prompt="Go"))
    assert told == [5, 5, 1, 5]  # 1: by the speed of two replies, 5: nothing waits


# --- Keys ---------------------------------------------------------------------------------------------------------------


def test_keys_come_and_go_while_the_gateway_runs(
    denoiser: Denoiser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As its file says; what a key has used up stays so, and a damaged or missing file changes nothing but the log."""
    ask_instead(monkeypatch, Controller(DeploymentStatus.HEALTHY))
    monkeypatch.setattr(gateway, "_KEYS_EVERY_S", 0.01)
    file, body = tmp_path / "keys", {"tokens": [7]}
    good, other = "sk-good-key", "sk-other-key"
    file.write_text(good)

    async def run() -> None:
        handle: Any = Handle(denoiser)
        access = Access(key_limits=KeyLimits(requests_per_minute=3))
        served, admission = [Served("tiny", {}, handle)], partial(Admission, 4, 2, 5)
        front = Gateway(served, admission, 8, RequestLimits(), access, str(file))
        api = front.__serve_build_asgi_app__()
        transport = httpx.ASGITransport(api)
        async with (
            api.router.lifespan_context(api),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):

            async def status(key: str, path: str = "/v1/models") -> int:
                headers = {"Authorization": f"Bearer {key}"}
                if path == "/v1/models":
                    return (await client.get(path, headers=headers)).status_code
                return (await client.post(path, headers=headers, json=body)).status_code

            async def until(key: str, expected: int) -> None:
                async with asyncio.timeout(60):
                    while await status(key) != expected:
                        await asyncio.sleep(0.01)

            async def until_told(reason: str) -> None:
                async with asyncio.timeout(60):
                    while reason not in caplog.text:
                        await asyncio.sleep(0.01)

            assert (await status(good), await status(other)) == (200, 401)
            assert [await status(good, "/detokenize") for _ in range(3)] == [200, 200, 200]
            file.write_text(f"{good}\n{other}")
            await until(other, 200)
            assert await status(good, "/detokenize") == 429
            file.write_text(other)
            await until(good, 401)
            file.write_text(f"{other}\nshort")
            await until_told(f"{file}, line 2: a key has at least 8 characters")
            file.unlink()
            await until_told(f"cannot read the file of API keys {file}")
            file.write_text("")
            await until_told(f"{file} holds no API key")
            await asyncio.sleep(0.1)
            assert (await status(good), await status(other)) == (401, 200)
            file.write_text(good)
            await until(good, 200)
            assert await status(other) == 401

    asyncio.run(run())
    told = [record.getMessage() for record in caplog.records if "API key" in record.getMessage()]
    assert len(told) == len({*told}) == 3
    assert not any(key in line for line in told for key in (good, other, "short"))
