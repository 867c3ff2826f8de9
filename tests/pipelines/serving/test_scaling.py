"""pipelines/serving/scaling.py: how many replicas the work asks for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from llada.sampling.config import SamplingConfig
from llada.sampling.events import Started
from pipelines.serving.dialects.completions import CompletionBody
from pipelines.serving.replica import Denoiser
from pipelines.serving.scaling import MEAN_REQUEST, REPLIES, USUAL_REQUEST, WORK, replicas_for_work

Replica = tuple[float, float, float, float]  # replies, work, mean, usual


def context(
    requests: float, queued: float, replicas: dict[str, Replica] | None, running: int = 2
) -> AutoscalingContext:
    names = (REPLIES, WORK, MEAN_REQUEST, USUAL_REQUEST)
    said = {
        name: {replica: values[i] for replica, values in (replicas or {}).items()}
        for i, name in enumerate(names)
    }
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="Denoiser",
        app_name="llada",
        current_num_replicas=running,
        target_num_replicas=running,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=queued,
        aggregated_metrics=None if replicas is None else said if replicas else {},
        raw_metrics={},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=20,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(
            target_ongoing_requests=4, min_replicas=0, max_replicas=20, upscale_delay_s=0, downscale_delay_s=0
        ),
    )


@pytest.mark.parametrize(
    ("requests", "queued", "said", "replicas"),
    [
        # Of the usual size, not begun: as Ray counts.
        (8, 0, {"a": (4, 400, 100, 100), "b": (4, 400, 100, 100)}, 2),
        # Half done.
        (8, 0, {"a": (4, 200, 100, 100), "b": (4, 200, 100, 100)}, 1),
        # One request of 32 replies.
        (1, 0, {"a": (32, 3200, 3200, 100)}, 8),
        # Eight of ten times the work: but no more replicas than replies.
        (8, 0, {"a": (8, 8000, 1000, 100)}, 8),
        (1, 0, {"a": (1, 90_000, 90_000, 100)}, 1),
        # What waits counts as the mean of what came.
        (12, 4, {"a": (4, 400, 300, 100), "b": (4, 400, 100, 100)}, (800 + 4 * 200) / 400),
        # Nobody has said anything yet: requests.
        (8, 3, None, 2),
        (8, 3, {}, 2),
        (0, 0, {"a": (0, 0, 100, 100)}, 0),
    ],
)
def test_work_decides_and_not_requests(
    requests: float, queued: float, said: dict[str, Replica] | None, replicas: float
) -> None:
    assert replicas_for_work(context(requests, queued, said)) == (replicas, {})


def test_as_serve_runs_it() -> None:
    """From nothing to one for whoever waits, up and down by whole replicas, and to nothing when there is no work."""
    policy = _apply_autoscaling_config(replicas_for_work)
    assert policy(context(3, 3, None, running=0))[0] == 1
    assert policy(context(8, 0, {"a": (8, 1000, 100, 100)}, running=1))[0] == 3
    assert policy(context(1, 0, {"a": (1, 10, 100, 100)}, running=2))[0] == 1
    assert policy(context(0, 0, {"a": (0, 0, 100, 100)}, running=1))[0] == 0


def test_a_replica_says_what_it_has(small_model: Path) -> None:
    """The work falls as it is done, and a request of twice the length is four times the work."""
    sampling = SamplingConfig(gen_length=16, steps=None, block_length=16)
    denoiser = Denoiser(str(small_model), sampling)

    def said() -> dict[str, float]:
        return asyncio.run(denoiser.record_autoscaling_stats())

    first = said()
    # As many tokens of a prompt as of the reply: 16 steps over 32 tokens.
    assert first == {REPLIES: 0, WORK: 0, MEAN_REQUEST: 512, USUAL_REQUEST: 512}

    async def begin() -> tuple[dict[str, float], dict[str, float]]:
        body = CompletionBody.model_validate(
            {"prompt": [7] * 16, "n": 2, "max_tokens": 480, "temperature": 1.0, "stream": True}
        )
        events = denoiser.stream(body)
        while not isinstance(await anext(events), Started):
            pass
        early = await denoiser.record_autoscaling_stats()
        for _ in range(8):
            await anext(events)
        late = await denoiser.record_autoscaling_stats()
        await events.aclose()
        return early, late

    early, late = asyncio.run(begin())
    whole = 2 * 480 * 496
    assert early[REPLIES] == late[REPLIES] == 2
    assert 0 < late[WORK] < early[WORK] <= whole
    assert 512 < late[MEAN_REQUEST] < whole
    denoiser.close()


def test_a_likelihood_is_work(small_model: Path) -> None:
    """By the chain rule 16 forwards of 16 tokens; of the bound, one for each sample."""
    denoiser = Denoiser(str(small_model), SamplingConfig(gen_length=16, steps=None, block_length=16))

    async def ask(**fields: int) -> float:
        asked = {"prompt": [7] * 16, "max_tokens": 0, "echo": True, "logprobs": 0, **fields}
        async for _ in denoiser.stream(CompletionBody.model_validate(asked)):
            pass
        return (await denoiser.record_autoscaling_stats())[MEAN_REQUEST]

    mean = asyncio.run(ask())
    assert mean == pytest.approx(512 + 0.1 * (16 * 16 - 512))
    assert asyncio.run(ask(likelihood_samples=3)) == pytest.approx(mean + 0.1 * (3 * 16 - mean))
    denoiser.close()
