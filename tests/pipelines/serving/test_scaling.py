"""pipelines/serving/scaling.py: how many replicas the load asks for."""

from __future__ import annotations

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from pipelines.serving.scaling import CHOICES, replicas_for_work


def context(requests: float, queued: float, choices: dict[str, float] | None) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="Denoiser",
        app_name="llada",
        current_num_replicas=2,
        target_num_replicas=2,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=queued,
        aggregated_metrics=None if choices is None else {CHOICES: choices},
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=20,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(target_ongoing_requests=4),
    )


@pytest.mark.parametrize(
    ("requests", "queued", "choices", "replicas"),
    [
        (8, 0, {"a": 4, "b": 4}, 2),  # of one reply each: as Ray counts
        (2, 0, {"a": 32, "b": 1}, 33 / 4),
        (5, 3, {"a": 32, "b": 1}, 36 / 4),
        (8, 3, None, 2),  # no replica has said anything yet
        (8, 3, {}, 2),
        (0, 0, {"a": 0}, 0),
    ],
)
def test_a_request_counts_as_its_replies(requests, queued, choices, replicas) -> None:
    assert replicas_for_work(context(requests, queued, choices)) == (replicas, {})
