"""The cost of a corpus: one case by hand, and what the measured rates and the real deduplication say."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llada.data.dedup.steps import DedupConfig, deduplicate, document_rows, plan_dedup, write_unit_rows
from llada.data.outcomes import KEPT, Report, merge
from llada.data.report import cost
from llada.data.report.cost import Cluster, Prices, Rates, estimate_cost, rates_of

ROUND = Rates(
    read=10e6,
    filter=1e6,
    minhash=5e6,
    exchange=1e6,
    tokenise=2e6,
    pack=100e6,
    bytes_per_token=4,
    document_bytes=2000,
    stored_ratio=0.5,
    passed_share=0.5,
    kept_share=0.25,
    filtered_ratio=0.4,
)
STEPS = ("read", "filter", "minhash", "exchange", "tokenise", "pack")
CLUSTER = Cluster(nodes=10, cores=100, store_bandwidth=1e9, reads_per_s=5500, writes_per_s=3500)


def test_one_trillion_tokens_by_hand() -> None:
    prices = Prices(node_hour=3, million_reads=0.4, million_writes=5, gigabyte_month=0.02)
    found = estimate_cost(1e12, ROUND, prices, CLUSTER)
    # 4 TB kept of 16 TB read, of which 8 TB pass the filters: 4 billion documents with 15 keys of 16 bytes
    assert found.text_bytes == 16e12
    assert found.documents == 4e9
    assert found.exchange_bytes == 960e9
    assert found.token_bytes == 4e12
    assert found.core_hours == pytest.approx(
        {
            "read": 16e12 / 10e6 / 3600,
            "filter": 16e12 / 1e6 / 3600,
            "minhash": 8e12 / 5e6 / 3600,
            "exchange": 60e9 / 1e6 / 3600,
            "tokenise": 4e12 / 2e6 / 3600,
            "pack": 4e12 / 100e6 / 3600,
        }
    )
    filtering, dedup, packing = found.stages
    # 8 TB of compressed input, 3.2 TB of filtered text, the keys; these read, sorted, written, read, 8 bytes indexed
    assert filtering.moved_bytes == 8e12 + 3.2e12 + 0.96e12
    assert dedup.moved_bytes == 60e9 * (16 + 16 + 16 + 8)
    assert packing.moved_bytes == 3.2e12 + 4e12
    assert filtering.limits["network"] == pytest.approx(12.16e12 / 1e10 / 3600)
    # 119,209.3 units of 64 MiB: 345 groups of 346; 60e9 keys in 4096 partitions; 174e6 keys of a group in 16 ranges
    assert dedup.reads == pytest.approx(8e12 / 2**26 * 16 * 2 + 345 * 4096 * 2)
    assert dedup.limits["requests"] == pytest.approx(dedup.reads / 5500 / 3600)
    hours = (16e12 / 10e6 + 16e12 / 1e6 + 8e12 / 5e6 + 4e12 / 2e6 + 4e12 / 100e6) / 3600 / 1000
    assert found.hours == pytest.approx(hours + dedup.limits["requests"])
    assert found.compute_dollars == pytest.approx(found.hours * 10 * 3)
    reads, writes = (sum(getattr(stage, name) for stage in found.stages) for name in ("reads", "writes"))
    assert found.requests == reads + writes
    assert found.request_dollars == pytest.approx(reads * 0.4e-6 + writes * 5e-6)
    assert found.storage_dollars == pytest.approx(4000 * 0.02)
    assert found.bottleneck == "filter"


@pytest.mark.parametrize("step", STEPS)
def test_twice_the_rate_is_half_the_core_hours_of_that_step_alone(step: str) -> None:
    slow = estimate_cost(3e12, ROUND).core_hours
    fast = estimate_cost(3e12, dataclasses.replace(ROUND, **{step: 2 * getattr(ROUND, step)})).core_hours
    assert tuple(slow) == STEPS
    assert {name: slow[name] / fast[name] for name in slow} == pytest.approx(
        {name: 2 if name == step else 1 for name in slow}
    )


@pytest.mark.parametrize(
    "cluster, bottleneck, limited_stages",
    [
        (CLUSTER, "filter", ("filter", "object store requests", "tokenise")),
        (
            dataclasses.replace(CLUSTER, store_bandwidth=1e6),
            "object store bandwidth",
            ("object store bandwidth",) * 3,
        ),
        (
            dataclasses.replace(CLUSTER, reads_per_s=1),
            "object store requests",
            ("object store requests",) * 3,
        ),
        (
            dataclasses.replace(CLUSTER, writes_per_s=1),
            "object store requests",
            ("object store requests",) * 3,
        ),
    ],
)
def test_the_bottleneck_is_the_slowest_resource(
    cluster: Cluster, bottleneck: str, limited_stages: tuple[str, ...]
) -> None:
    found = estimate_cost(1e12, ROUND, cluster=cluster)
    assert found.bottleneck == bottleneck
    assert tuple(stage.limit for stage in found.stages) == limited_stages


def test_more_nodes_are_faster_until_the_store_answers_no_more() -> None:
    few, many, more = (estimate_cost(15e12, cluster=Cluster(nodes=n)).hours for n in (16, 1024, 4096))
    assert few > 3 * many
    assert many < 1.5 * more  # the requests are as many on four times the nodes


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="filter must be positive"):
        estimate_cost(1e12, dataclasses.replace(ROUND, filter=0))
    with pytest.raises(ValueError, match="tokens must be positive"):
        estimate_cost(0)
    with pytest.raises(ValueError, match="nodes must be positive"):
        estimate_cost(1e12, cluster=Cluster(nodes=-1))


def test_the_deduplication_moves_the_bytes_that_are_paid_for(tmp_path: Path) -> None:
    letters = np.random.default_rng(0).choice(list("abcdefgh"), size=(400, 30, 6))
    texts = [" ".join("".join(word) for word in words) for words in letters]
    config = DedupConfig()
    units = [document_rows(texts[:200], config), document_rows(texts[200:], config)]
    keys = sum(map(len, units))
    assert keys == len(texts) * cost.KEYS_PER_DOCUMENT
    urls = [str(tmp_path / f"{unit}.keys") for unit in range(2)]
    for url, rows in zip(urls, units, strict=True):
        assert rows[:1].nbytes == cost.KEY_BYTES
        write_unit_rows(url, rows)
    folder = tmp_path / "dedup"
    deduplicate(urls, str(folder), plan_dedup("documents", 2, keys), config)
    files = [*map(Path, urls), *(folder / "combined").iterdir(), *(folder / "index").iterdir()]
    written = sum(file.stat().st_size for file in files) / keys
    read = 2 * cost.KEY_BYTES  # by `combine` and by `link`
    assert written + read == pytest.approx(cost._KEY_TRAFFIC, rel=0.03)  # each file has a header


def _measured() -> Report:
    """1000 bytes read from 400 stored; 600 pass in 3 documents, one a duplicate of 100; 125 tokens of 500 bytes."""
    report = Report(input_bytes=400)
    report.outcomes = {
        "en": {KEPT: [1, 300], "gopher_quality.few_words": [4, 400]},
        "zh": {KEPT: [1, 200], "duplicate": [1, 100]},
    }
    report.splits = {"train": {"tokens": 100}, "validation": {"tokens": 25}}
    report.seconds = {"filter": 2.0, "tokenise": 0.5}
    return report


def test_rates_are_those_of_the_run_and_defaults_for_the_rest() -> None:
    found = rates_of(_measured())
    expected = {
        "filter": 500,
        "tokenise": 1000,
        "bytes_per_token": 4,
        "document_bytes": 200,
        "stored_ratio": 0.4,
        "passed_share": 0.6,
        "kept_share": 0.5,
    }
    assert found == dataclasses.replace(Rates(), **expected, measured=frozenset(expected))


def test_rates_do_not_depend_on_how_often_the_same_was_measured() -> None:
    assert rates_of(merge([_measured(), _measured()])) == rates_of(_measured())


def test_a_run_that_read_or_kept_nothing_can_be_costed() -> None:
    assert rates_of(Report()) == Rates()
    refused = Report(input_bytes=40, outcomes={"en": {"too_short": [1, 100]}}, seconds={"filter": 1.0})
    found = rates_of(refused)
    assert found == dataclasses.replace(
        Rates(), filter=100, stored_ratio=0.4, measured=frozenset({"filter", "stored_ratio"})
    )
    assert estimate_cost(1e12, found).dollars > 0
