"""Core-hours at the two rates, the faster of which is the committed benchmarks'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada.data.report.cost import Cluster, Rates, estimate_cost
from llada.plan.corpus import FAST, SLOW, plan_corpus, with_work
from llada.plan.prices import DEFAULT

RESULTS = Path(__file__).parents[3] / "tests/benchmarks/results"


def test_the_faster_rates_are_the_measured_ones() -> None:
    def read(name: str) -> dict:
        return json.loads((RESULTS / f"{name}.json").read_text())

    chain = next(row for row in read("filters")["rows"] if row["filter"] == "chain, words remembered")
    language = next(row for row in read("extraction")["languages"] if row["identifier"].startswith("llada"))
    in_series = 1 / (1 / chain["megabytes_per_second"] + 1 / language["mb_per_s"] + 1 / 60)
    assert pytest.approx(in_series * 1e6, rel=0.01) == FAST.filter
    minhash = read("minhash")
    assert minhash["signatures"]["llada"]["mb_per_s"] * 1e6 == pytest.approx(FAST.minhash, rel=0.01)
    assert minhash["graph"][-1]["rows_per_s_per_core"] == pytest.approx(FAST.exchange, rel=0.01)
    assert Rates() == SLOW


def test_ranges_and_storage_by_hand() -> None:
    """A trillion tokens: 4.2 TB kept, 58 % of what is read, which is stored at 0.4 of its size; 4 bytes a token."""
    plan = plan_corpus(1e12, DEFAULT, Cluster(nodes=32))
    assert plan.raw_bytes == pytest.approx(4.2e12 / 0.58 * 0.4)
    assert plan.clean_bytes == pytest.approx(4.2e12 * 0.4)
    assert plan.token_bytes == 4e12
    assert plan.storage.low == pytest.approx((plan.raw_bytes + 4e12) / 1e9 * DEFAULT.machines.gigabyte_month)
    assert plan.core_hours[0] < plan.core_hours[1]
    assert plan.hours[0] < plan.hours[1]
    slow = estimate_cost(1e12, SLOW, DEFAULT.machines, Cluster(nodes=32))
    assert plan.core_hours[1] == pytest.approx(sum(slow.core_hours.values()))
    assert plan.compute.high == pytest.approx(slow.dollars)
    assert plan.compute.prices == DEFAULT.label


def test_cores_without_a_task_do_nothing_and_are_paid_all_the_same() -> None:
    cluster = Cluster(nodes=1000, cores=64)
    assert with_work(cluster, 4096) == Cluster(nodes=1000, cores=4)
    assert with_work(Cluster(nodes=16, cores=64), 4096).cores == 64
    all_busy, idle = (plan_corpus(1e12, DEFAULT, each) for each in (cluster, with_work(cluster, 4096)))
    assert idle.core_hours == all_busy.core_hours
    assert idle.compute.high > all_busy.compute.high
