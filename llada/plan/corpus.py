"""What the data of a run cost: core-hours, hours on a cluster of CPUs, and bytes from raw text to tokens.

The arithmetic is that of the reports of preparations (llada/data/report/cost.py); here it is done at two rates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llada.data.report.cost import Cluster, Cost, Rates, estimate_cost
from llada.plan.prices import Dollars, PriceList

SLOW = Rates()
FAST = replace(SLOW, filter=1.77e6, minhash=8.5e6, exchange=1.43e6)
"""Per core of an AMD EPYC, of tests/benchmarks/results: the chain of filters.json with its words remembered (7.33 MB/s) and
language identification of extraction.json (2.42 MB/s), with PII (60 MB/s) in series; signatures and graph of minhash.json."""


@dataclass(frozen=True)
class CorpusPlan:
    """(least, most) of each, by `FAST` and by `SLOW`."""

    tokens: float
    core_hours: tuple[float, float]
    hours: tuple[float, float]
    """On the cluster."""
    bottleneck: str
    """What takes most of them."""
    raw_bytes: float
    """Compressed text, as it is read."""
    text_bytes: float
    """The same, not compressed."""
    clean_bytes: float
    """What is left of it, compressed as between the stages."""
    token_bytes: float
    """Shards: 4 bytes a token."""
    requests: float
    """To the object store."""
    compute: Dollars
    """Nodes and requests."""
    storage: Dollars
    """A month of raw text and tokens."""
    nodes: int
    cores: int
    """Of a node, as far as there is work for them."""


def with_work(cluster: Cluster, tasks: int) -> Cluster:
    """The cluster with those of its cores for which there are so many tasks at a time."""
    return replace(cluster, cores=min(cluster.cores, max(1, tasks // cluster.nodes)))


def plan_corpus(tokens: float, prices: PriceList, cluster: Cluster) -> CorpusPlan:
    """To filter, deduplicate, tokenise and pack `tokens` tokens that are kept, from compressed text."""
    fast, slow = (estimate_cost(tokens, rates, prices.machines, cluster) for rates in (FAST, SLOW))
    raw = slow.text_bytes * SLOW.stored_ratio
    month = prices.machines.gigabyte_month / 1e9
    return CorpusPlan(
        tokens=tokens,
        core_hours=(_core_hours(fast), _core_hours(slow)),
        hours=(fast.hours, slow.hours),
        bottleneck=slow.bottleneck,
        raw_bytes=raw,
        text_bytes=slow.text_bytes,
        clean_bytes=tokens * SLOW.bytes_per_token * SLOW.filtered_ratio,
        token_bytes=slow.token_bytes,
        requests=slow.requests,
        compute=prices.dollars(fast.dollars, slow.dollars),
        storage=prices.dollars((raw + slow.token_bytes) * month),
        nodes=cluster.nodes,
        cores=cluster.cores,
    )


def _core_hours(cost: Cost) -> float:
    return sum(cost.core_hours.values())
