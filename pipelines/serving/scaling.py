"""How many replicas the work asks for. Ray Serve runs this in its controller, from a copy: nothing of ours is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

# What each replica reports (`Denoiser.record_autoscaling_stats`).
REPLIES = "replies"
"""That it has and that are not complete."""
WORK = "work"
"""Token-forwards that these will probably still take."""
MEAN_REQUEST = "mean_request"
"""Token-forwards of a request as they have come of late."""
USUAL_REQUEST = "usual_request"
"""Token-forwards of a request that leaves everything to the endpoint, in whose number the target is said."""


def replicas_for_work(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """(replicas, nothing to remember): Serve's autoscaling policy, which adds the bounds and the delays.

    Work is what is left of the replies that the replicas have, and, for each request that waits for a replica, of which
    nobody knows more, that of a mean one. `target_ongoing_requests` usual requests are one replica's. As a reply is one
    replica's as a whole, there are never to be more replicas than replies.
    """
    assert ctx.config is not None
    target = ctx.config.get_target_ongoing_requests()
    said = ctx.aggregated_metrics or {}
    usual = list(said.get(USUAL_REQUEST, {}).values())
    if not usual:  # no replica has said anything yet: requests are all that is known
        return ctx.total_num_requests / target, {}
    means = list(said[MEAN_REQUEST].values())
    queued = ctx.total_queued_requests
    work = sum(said[WORK].values()) + queued * sum(means) / len(means)
    replies = sum(said[REPLIES].values()) + queued
    return min(work / (target * sum(usual) / len(usual)), replies), {}
