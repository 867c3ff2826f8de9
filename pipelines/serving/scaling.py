"""How many replicas the load asks for. Ray Serve runs this in its controller, from a copy: nothing of ours is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

CHOICES = "choices"


def replicas_for_work(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """(replicas, nothing to remember): Serve's autoscaling policy, which adds the bounds and the delays.

    A request that a replica has counts as its unfinished replies (the metric CHOICES of each): one with `n: 32` is 32
    times the work of another. What waits for a replica counts as one each, for nobody has read it.
    """
    assert ctx.config is not None
    replies = sum(ctx.aggregated_metrics.get(CHOICES, {}).values()) if ctx.aggregated_metrics else 0.0
    work = max(ctx.total_num_requests, ctx.total_queued_requests + replies)
    return work / ctx.config.get_target_ongoing_requests(), {}
