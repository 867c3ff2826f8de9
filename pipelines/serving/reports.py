"""What the replicas' engines say of themselves, on its way to the gateway's /metrics.

Each replica tells the gateway every few seconds what its engine has done since its beginning. What a replica that is no more
has done stays in the sums.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llada.sampling.stats import BLOCK_SECONDS, EngineStats

if TYPE_CHECKING:
    from pipelines.serving.multiplexed import MultiplexedDenoiser
    from pipelines.serving.replica import Denoiser

REPORT_EVERY_S = 5.0
_GONE_AFTER_S = 4 * REPORT_EVERY_S
_reports = set[asyncio.Task[None]]()  # an event loop itself holds none of its tasks

_COUNTERS = {
    "forwards": ("batch_forwards", "Forwards of the networks, each over a batch of rows"),
    "rows": ("batch_rows", "Rows that these have brought on; over batch_forwards: the mean occupancy"),
    "tokens": ("token_forwards", "Tokens fed to the networks"),
    "seconds": ("busy_seconds", "Spent in forwards"),
    "cache_refreshes": ("cache_refreshes", "Times that a row with a cache was fed as a whole"),
    "cancelled_replies": ("cancelled_replies", "Replies begun, and then given up or failed"),
    "cancelled_tokens": ("cancelled_token_forwards", "Tokens fed to the networks for those"),
}
_GAUGES = {
    "rows_now": ("batch_rows_now", "Rows on the canvases"),
    "rows_most": ("batch_rows_most", "Rows that the canvases take at a time"),
    "cache_bytes": ("cache_bytes", "Keys and values that the rows on the canvases may take"),
    "work_left": ("work_left", "Token-forwards that the replies at the replicas will probably still take"),
}


class ReplicaReports(Collector):
    """The sums over all replicas, for prometheus_client."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._last: dict[str, tuple[float, EngineStats]] = {}
        self._gone: dict[
            str, EngineStats
        ] = {}  # by name: who was only silent comes back with what it has counted

    def take(self, replica: str, stats: EngineStats) -> None:
        """What a replica has to say; it replaces what it said before."""
        with self._lock:
            self._gone.pop(replica, None)
            self._last[replica] = (self._clock(), stats)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            for replica, (said_at, stats) in list(self._last.items()):
                if said_at < self._clock() - _GONE_AFTER_S:
                    self._gone[replica] = stats
                    del self._last[replica]
            here = [stats for _, stats in self._last.values()]
            total = EngineStats()
            for stats in [*self._gone.values(), *here]:
                add_stats(total, stats)
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"llada_{name}", text, value=getattr(total, field))
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"llada_{name}", text, value=sum(getattr(one, field) for one in here))
        bounds = [*map(str, BLOCK_SECONDS), "+Inf"]
        counts = [sum(total.blocks[: i + 1]) for i in range(len(bounds))]
        yield HistogramMetricFamily(
            "llada_block_seconds",
            "From the end of a reply's block to that of its next",
            buckets=list(zip(bounds, counts, strict=True)),
            sum_value=total.block_seconds,
        )


def add_stats(total: EngineStats, stats: EngineStats) -> None:
    """Sum up, in place."""
    total.blocks = [a + b for a, b in zip(total.blocks, stats.blocks, strict=True)]
    for field in fields(EngineStats):
        if field.name != "blocks":
            setattr(total, field.name, getattr(total, field.name) + getattr(stats, field.name))


def report_to_gateway(denoiser: Denoiser | MultiplexedDenoiser) -> None:
    """Tell the application's gateway of this replica's engines for as long as it lives; without Ray Serve, nothing."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        context = serve.get_replica_context()
    except RayServeException:
        return
    name = context.replica_id.unique_id
    # In the replica's event loop: where that is the handles', too (SERVE_DIRECTLY), they can be used nowhere else.
    report = asyncio.get_running_loop().create_task(_report(weakref.ref(denoiser), context.app_name, name))
    _reports.add(report)


async def _report(denoiser: weakref.ref[Denoiser | MultiplexedDenoiser], app_name: str, name: str) -> None:
    from ray import serve

    gateway = None
    while (there := denoiser()) is not None:
        stats = there.stats()
        del there
        with contextlib.suppress(
            Exception
        ):  # the application is still being built, or the gateway away: the next one counts
            if gateway is None:
                gateway = await asyncio.to_thread(serve.get_app_handle, app_name)
            async with asyncio.timeout(REPORT_EVERY_S):
                await gateway.report.remote(name, stats)
        await asyncio.sleep(REPORT_EVERY_S)
