"""What a preparation of trillions of tokens costs, from the rates that a run measured on one core.

    rates_of(report) -> Rates     estimate_cost(tokens, rates, prices, cluster) -> Cost

A corpus goes through three stages with barriers between them. In each the cores work on one task while others wait
for the object store, so a stage takes as long as the slowest of: its computation, its bytes through the nodes'
network, its requests at the store's limit. A core is what the operating system calls one (a vCPU).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from llada.data.dedup.steps import DedupConfig, plan_dedup
from llada.data.outcomes import KEPT, Report
from llada.data.report.funnel import DUPLICATES, NOTHING, amount_read, by_outcome

CORPORA = (1e12, 3e12, 15e12)  # tokens; LLaDA 8B was trained on 2.3e12, Llama 3 on 15e12
KEYS_PER_DOCUMENT = DedupConfig.bands + 1  # the MinHash bands and the hash of the text
KEY_BYTES = 16  # uint64 key, uint64 document
TOKEN_BYTES = 4
# A key is written by its unit, read and written by `combine`, read by `link`, which writes 8 bytes of it to the index.
# Edges and removals, which only duplicates have, are left out.
_KEY_TRAFFIC = 4 * KEY_BYTES + 8
_UNIT_BYTES = 64 << 20  # stored input of a work unit, as PrepareConfig.unit_bytes
# Of llada/data/work/tasks.py, per unit: input in blocks of 50 MiB, sizes, filtered text, removals,
# reports; then written: filtered text, keys, shards, unigrams, two reports.
_UNIT_READS, _UNIT_WRITES = 12, 6
_SLICE_READS = 2  # the head of an exchange file and a byte range of it


@dataclass(frozen=True)
class Rates:
    """Speed of each step per core, and the shape of the data. The defaults are for what a run does not measure:
    English web text on one core of an Intel Xeon of 2.5 GHz; `filter` and `minhash` are those of tests/benchmarks."""

    read: float = 40e6
    """Bytes of text per second and core: .jsonl.gz, decompressed and parsed (WARC with extraction: about 1e6)."""
    filter: float = 0.9e6
    """Bytes of text: four heuristic filters 1.5e6, language identification 2.2e6, PII 6e7, in series."""
    minhash: float = 7e6
    """Bytes of filtered text: signatures, and the keys written."""
    exchange: float = 1.3e6
    """Keys, through the two sorts of llada/data/dedup/steps.py (measured on 16 million)."""
    tokenise: float = 1.5e6
    """Bytes of kept text: byte-level BPE of 50,000 entries, without threads."""
    pack: float = 200e6
    """Bytes of kept text: concatenating alone does 380e6, the rest is for checksums and writing (an assumption)."""
    bytes_per_token: float = 4.2
    document_bytes: float = 2200.0
    """Text of a document that passes the filters; the size in which these rates were measured."""
    stored_ratio: float = 0.4
    """Bytes of compressed input per byte of its text: gzip."""
    passed_share: float = 0.73
    """Bytes that pass the filters, of those read: NeMo Curator's nightly benchmark of heuristic filters."""
    kept_share: float = 0.58
    """Bytes that are tokenised, of those read: a fifth of what passed is duplicates (an assumption)."""
    filtered_ratio: float = 0.4
    """Bytes of filtered text as it is stored between the stages (zstd), per byte (an assumption)."""
    measured: frozenset[str] = frozenset()
    """Names of the fields above that a run measured."""


@dataclass(frozen=True)
class Prices:
    """In dollars: AWS, us-east-1, on demand, list prices of 2026. Transfer between nodes and S3 of one region is free."""

    node_hour: float = 3.2256
    """m7i.16xlarge: 64 vCPU, 256 GB, 25 Gbit/s."""
    million_reads: float = 0.40
    """GET and HEAD, S3 Standard."""
    million_writes: float = 5.00
    """PUT, S3 Standard."""
    gigabyte_month: float = 0.021
    """S3 Standard, above 500 TB; 0.023 below 50 TB."""


@dataclass(frozen=True)
class Cluster:
    """Where it runs."""

    nodes: int = 16
    cores: int = 64
    """Of a node."""
    store_bandwidth: float = 2.5e9
    """Bytes per second between one node and the object store: four fifths of 25 Gbit/s."""
    reads_per_s: float = 5500.0
    """That the store answers under one prefix, whatever the number of nodes: S3."""
    writes_per_s: float = 3500.0


@dataclass(frozen=True)
class Stage:
    """What happens between two barriers."""

    name: str
    core_hours: dict[str, float]
    """By step."""
    moved_bytes: float
    """Between nodes and object store."""
    reads: float
    writes: float
    limits: dict[str, float]
    """Hours on the cluster if nothing else took time, for "cpu", "network" and "requests"."""

    @property
    def hours(self) -> float:
        return max(self.limits.values())

    @property
    def limit(self) -> str:
        """What takes these hours: the most expensive step, "object store bandwidth" or "object store requests"."""
        limit = max(self.limits, key=self.limits.__getitem__)
        if limit == "cpu":
            return max(self.core_hours, key=self.core_hours.__getitem__)
        return {"network": "object store bandwidth", "requests": "object store requests"}[limit]


@dataclass(frozen=True)
class Cost:
    """Of one corpus. Bytes are bytes of what is named; `moved_bytes` all that nodes and object store exchange."""

    tokens: float
    text_bytes: float
    documents: float
    """That pass the filters."""
    exchange_bytes: float
    """Keys that the deduplication sorts."""
    token_bytes: float
    stages: tuple[Stage, ...]
    compute_dollars: float
    request_dollars: float
    storage_dollars: float
    """A month of the token shards."""

    @property
    def core_hours(self) -> dict[str, float]:
        """By step, in the order of the pipeline."""
        return {step: hours for stage in self.stages for step, hours in stage.core_hours.items()}

    @property
    def moved_bytes(self) -> float:
        return sum(stage.moved_bytes for stage in self.stages)

    @property
    def requests(self) -> float:
        return sum(stage.reads + stage.writes for stage in self.stages)

    @property
    def hours(self) -> float:
        """On the cluster, from the first byte read to the last one written."""
        return sum(stage.hours for stage in self.stages)

    @property
    def dollars(self) -> float:
        """Nodes and requests, without storage."""
        return self.compute_dollars + self.request_dollars

    @property
    def bottleneck(self) -> str:
        """What limits the longest stage."""
        return max(self.stages, key=lambda stage: stage.hours).limit


def rates_of(report: Report) -> Rates:
    """The rates that a run measured; what it did not measure, or had nothing to measure on, stays a default."""
    amounts = by_outcome(report)
    kept, text = amounts.get(KEPT, NOTHING).bytes, amount_read(report).bytes
    passing = [amounts.get(outcome, NOTHING) for outcome in (KEPT, *DUPLICATES)]
    passed = sum(amount.bytes for amount in passing)
    passed_documents = sum(amount.documents for amount in passing)
    tokens = sum(split.get("tokens", 0) for split in report.splits.values())
    handled = {
        "read": text,
        "filter": text,
        "minhash": passed,
        "exchange": passed_documents * KEYS_PER_DOCUMENT,
        "tokenise": kept,
        "pack": kept,
    }
    ratios = {
        **{step: (amount, report.seconds.get(step, 0.0)) for step, amount in handled.items()},
        "bytes_per_token": (kept, tokens),
        "document_bytes": (passed, passed_documents),
        "stored_ratio": (report.input_bytes, text),
        "passed_share": (passed, text),
        "kept_share": (kept, text),
    }
    measured = {name: above / below for name, (above, below) in ratios.items() if above and below}
    if "kept_share" not in measured:  # a run that kept nothing says nothing about what a corpus loses
        measured.pop("passed_share", None)
    return replace(Rates(), **measured, measured=frozenset(measured))


def estimate_cost(
    tokens: float, rates: Rates | None = None, prices: Prices | None = None, cluster: Cluster | None = None
) -> Cost:
    """What it takes to prepare `tokens` tokens: filtered, deduplicated, tokenised and packed ones.

    Raises ValueError when a number that must be positive is not.
    """
    rates, prices, cluster = rates or Rates(), prices or Prices(), cluster or Cluster()
    _check_positive(tokens, rates, cluster)
    kept = tokens * rates.bytes_per_token
    text = kept / rates.kept_share
    passed = text * rates.passed_share
    documents = passed / rates.document_bytes
    keys = documents * KEYS_PER_DOCUMENT
    stored, filtered = text * rates.stored_ratio, passed * rates.filtered_ratio
    units = max(1.0, stored / _UNIT_BYTES)
    plan = plan_dedup("documents", round(units), round(keys))
    cells = plan.groups * plan.ranges
    combine_reads = units * plan.ranges * _SLICE_READS
    link_reads = plan.groups * plan.partitions * _SLICE_READS

    def stage(name: str, amounts: dict[str, float], moved_bytes: float, reads: float, writes: float) -> Stage:
        core_hours = {step: amount / getattr(rates, step) / 3600 for step, amount in amounts.items()}
        limits = {
            "cpu": sum(core_hours.values()) / (cluster.nodes * cluster.cores),
            "network": moved_bytes / (cluster.nodes * cluster.store_bandwidth) / 3600,
            "requests": max(reads / cluster.reads_per_s, writes / cluster.writes_per_s) / 3600,
        }
        return Stage(name, core_hours, moved_bytes, reads, writes, limits)

    # The unit writes its keys: the rest of their traffic belongs to the deduplication.
    unit_keys = keys * KEY_BYTES
    stages = (
        stage(
            "filter",
            {"read": text, "filter": text, "minhash": passed},
            stored + filtered + unit_keys,
            units * _UNIT_READS / 2,
            units * _UNIT_WRITES / 2,
        ),
        stage(
            "deduplicate",
            {"exchange": keys},
            keys * _KEY_TRAFFIC - unit_keys,
            combine_reads + link_reads,
            2 * (cells + plan.partitions),
        ),
        stage(
            "pack",
            {"tokenise": kept, "pack": kept},
            filtered + tokens * TOKEN_BYTES,
            units * _UNIT_READS / 2,
            units * _UNIT_WRITES / 2,
        ),
    )
    return Cost(
        tokens=tokens,
        text_bytes=text,
        documents=documents,
        exchange_bytes=unit_keys,
        token_bytes=tokens * TOKEN_BYTES,
        stages=stages,
        compute_dollars=sum(s.hours for s in stages) * cluster.nodes * prices.node_hour,
        request_dollars=sum(s.reads * prices.million_reads + s.writes * prices.million_writes for s in stages)
        / 1e6,
        storage_dollars=tokens * TOKEN_BYTES / 1e9 * prices.gigabyte_month,
    )


def _check_positive(tokens: float, rates: Rates, cluster: Cluster) -> None:
    numbers = {"tokens": tokens}
    for settings in (rates, cluster):
        numbers |= {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "measured"}
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"cost: {name} must be positive (it is {number}); leave it out for the default")
