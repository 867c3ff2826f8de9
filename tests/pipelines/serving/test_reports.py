"""The sums over replicas that come and go. (Their way from a replica to the gateway: tests/pipelines/test_serve.py.)"""

from __future__ import annotations

import threading
from dataclasses import fields

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from llada.sampling.stats import EngineStats
from pipelines.serving import reports
from pipelines.serving.replica import Denoiser
from pipelines.serving.reports import ReplicaReports, report_to_gateway


def stats(blocks: int = 0, **values: float) -> EngineStats:
    found = EngineStats(**values)  # type: ignore[arg-type]
    for _ in range(blocks):
        found.add_block(0.2)
    return found


def read(reports: ReplicaReports) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(reports)
    text = generate_latest(registry).decode()
    return {
        s.name + (f"<{s.labels['le']}" if "le" in s.labels else ""): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_what_is_done_adds_up_and_what_is_there_is_of_those_who_are() -> None:
    now = 0.0
    sums = ReplicaReports(lambda: now)
    assert read(sums)["llada_batch_forwards_total"] == 0
    sums.take("a", stats(forwards=3, rows=9, rows_now=2, rows_most=8, blocks=2))
    sums.take("b", stats(forwards=1, rows=4, rows_now=4, rows_most=8, blocks=1))
    sums.take("a", stats(forwards=5, rows=15, rows_now=1, rows_most=8, blocks=3))
    values = read(sums)
    assert (values["llada_batch_forwards_total"], values["llada_batch_rows_total"]) == (6, 19)
    assert (values["llada_batch_rows_now"], values["llada_batch_rows_most"]) == (5, 16)
    assert values["llada_block_seconds_count"] == 4
    assert values["llada_block_seconds_sum"] == pytest.approx(0.8)
    assert (values["llada_block_seconds_bucket<0.1"], values["llada_block_seconds_bucket<0.25"]) == (0, 4)
    now = 1000.0
    sums.take("b", stats(forwards=2, rows=5, rows_now=0, rows_most=8, blocks=1))  # and a is no more
    values = read(sums)
    assert (values["llada_batch_forwards_total"], values["llada_batch_rows_now"]) == (7, 0)
    assert values["llada_block_seconds_count"] == 4
    assert read(sums) == values
    # It was only busy: what it has counted is counted once.
    sums.take("a", stats(forwards=6, rows=18, rows_now=1, rows_most=8, blocks=3))
    assert read(sums)["llada_batch_forwards_total"] == 8


def test_everything_that_an_engine_says_is_shown() -> None:
    shown = {*reports._COUNTERS, *reports._GAUGES, "blocks", "block_seconds"}
    assert {field.name for field in fields(EngineStats)} - shown == {
        "replies"
    }  # the gateway knows the requests


def test_without_serve_nobody_is_told(denoiser: Denoiser) -> None:
    before = threading.active_count()
    report_to_gateway(denoiser)
    assert threading.active_count() == before
