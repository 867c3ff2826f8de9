"""The cost of preparing trillions of tokens, as tables of the HTML report."""

from __future__ import annotations

from collections.abc import Iterable

from llada.data.report.cost import CORPORA, Cluster, Cost, Prices, Rates, estimate_cost
from llada.data.report.html import (
    Markup,
    details,
    format_bytes,
    format_count,
    format_dollars,
    join,
    note,
    table,
    tag,
)

_NODES = (16, 64, 256)


def cost_tables(rates: Rates) -> Markup:
    """HTML: the cost of 1, 3 and 15 trillion tokens, on clusters of several sizes, and what it is computed from."""
    prices, cluster = Prices(), Cluster()
    costs = [estimate_cost(tokens, rates, prices, cluster) for tokens in CORPORA]
    head = ("", *(f"{tokens / 1e12:g} trillion tokens" for tokens in CORPORA))
    align = "l" + "r" * len(costs)
    steps = {step: [format_count(cost.core_hours[step]) for cost in costs] for step in costs[0].core_hours}
    amounts: list[tuple[str, Iterable[str]]] = [
        ("Text read", (format_bytes(c.text_bytes) for c in costs)),
        ("Documents to deduplicate", (f"{c.documents / 1e6:,.0f} million" for c in costs)),
        *((f"Core-hours: {step}", hours) for step, hours in steps.items()),
        ("Core-hours, all", (format_count(sum(c.core_hours.values())) for c in costs)),
        ("Moved between nodes and object store", (format_bytes(c.moved_bytes) for c in costs)),
        ("Keys to deduplicate by", (format_bytes(c.exchange_bytes) for c in costs)),
        ("Requests to the object store", (f"{c.requests / 1e6:,.1f} million" for c in costs)),
        ("Price of the requests", (format_dollars(c.request_dollars) for c in costs)),
        ("Token shards", (format_bytes(c.token_bytes) for c in costs)),
        ("Price of storing them, a month", (format_dollars(c.storage_dollars) for c in costs)),
    ]
    clusters: list[tuple[object, ...]] = []
    for nodes in _NODES:
        sized = [estimate_cost(t, rates, prices, Cluster(nodes=nodes)) for t in CORPORA]
        clusters.append((f"{nodes} nodes of {cluster.cores} cores", *map(_cluster_cell, sized)))
    assumed = [
        (name, format_rate(name, rates) if name in steps else f"{getattr(rates, name):,.4g}",
         "this run" if name in rates.measured else "default")
        for name in vars(rates) if name != "measured"
    ]  # fmt: skip
    explained = (
        "Finished tokens: filtered, deduplicated, packed. Compute and transfers overlap within a stage, stages do not; "
        f"${prices.node_hour} per node and hour, ${prices.million_reads:.2f} and ${prices.million_writes:.2f} per million "
        f"reads and writes, {cluster.store_bandwidth / 1e9:g} GB/s per node (AWS us-east-1, list prices of 2026)."
    )
    return join(
        note(explained),
        table(head, [(name, *values) for name, values in amounts], align),
        tag("h3", "Time · nodes and requests · bottleneck"),
        table(head, clusters, align),
        details("What this is computed from", table(("Quantity", "Value", "From"), assumed, "lrl")),
    )


def format_rate(step: str, rates: Rates) -> str:
    """What one core does in a second of a step."""
    rate = getattr(rates, step)
    return f"{format_count(rate)} keys/s" if step == "exchange" else f"{format_bytes(rate)}/s"


def _cluster_cell(cost: Cost) -> str:
    return f"{cost.hours:,.1f} hours · {format_dollars(cost.dollars)} · {cost.bottleneck}"
