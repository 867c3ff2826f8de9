"""The gateway's counters, however a request ends."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llada.sampling.events import Draft, Finished, Started, Text
from pipelines.serving.errors import RequestError
from pipelines.serving.events import Restarted
from pipelines.serving.keys import Account, KeyLimits
from pipelines.serving.metrics import GatewayMetrics


def read(metrics: GatewayMetrics) -> dict[str, float]:
    """{name: value summed over its labels}."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0) + sample.value
    return values


def test_a_request_is_queued_then_running_then_counted() -> None:
    metrics = GatewayMetrics()
    with metrics.track("/v1/completions") as track:
        assert (read(metrics)["llada_requests_queued"], read(metrics)["llada_requests_running"]) == (0, 0)
        track.wait()  # its body has come
        assert (read(metrics)["llada_requests_queued"], read(metrics)["llada_requests_running"]) == (1, 0)
        for index in range(2):  # the choices of one request start one by one
            track.see(Started(index))
            assert (read(metrics)["llada_requests_queued"], read(metrics)["llada_requests_running"]) == (0, 1)
        track.see(Text(0, "An echo"))
        assert "llada_first_text_seconds_count" not in read(metrics)
        track.see(Text(0, "Hello", (), 4))
        track.see(Text(0, " you", (), 8))
        track.see(Finished(0, "length", prompt_tokens=3, completion_tokens=8, nfe=4))
        track.see(Finished(1, "stop", prompt_tokens=0, completion_tokens=0, nfe=0))
        track.status = 200
    values = read(metrics)
    assert (values["llada_requests_queued"], values["llada_requests_running"]) == (0, 0)
    assert (values["llada_prompt_tokens_total"], values["llada_completion_tokens_total"]) == (3, 8)
    assert (values["llada_forwards_total"], values["llada_first_text_seconds_count"]) == (4, 1)
    assert (values["llada_tokens_per_forward_count"], values["llada_tokens_per_forward_sum"]) == (1, 2)
    assert values["llada_requests_total"] == 1


def test_who_leaves_in_the_middle_has_had_what_was_there() -> None:
    """One choice is finished, one has begun, and what a replica that died has written does not count."""
    metrics, account = GatewayMetrics(), Account("me", KeyLimits(tokens_per_minute=100))
    with metrics.track("/v1/completions", account=account) as track:
        track.see(Started(0, 5))
        track.see(Text(0, "void", (), 90))
        track.see(Restarted())
        track.see(Started(0, 5))
        track.see(Started(1))
        track.see(Finished(0, "stop", prompt_tokens=5, completion_tokens=3, nfe=3))
        track.see(Text(1, "Hello", (), 40))
        track.see(Draft(1, 2, (0, 64), ("Hel", "lo", None), (0, 1, None), (1.0, 1.0, None)))
        track.see(Text(1, " you", (), 60))
    values = read(metrics)
    assert (values["llada_prompt_tokens_total"], values["llada_completion_tokens_total"]) == (5, 63)
    account.admit()
    account.charge(100 - 68 + 2)  # a second gives less than two back
    with pytest.raises(RequestError, match="tokens"):
        account.admit()


def test_drafts_that_were_read_count_and_likelihoods_are_no_replies() -> None:
    metrics = GatewayMetrics()
    with metrics.track("/v1/completions") as track:
        track.see(Started(0, 300))  # of a likelihood
        track.see(Finished(0, "length", prompt_tokens=300, completion_tokens=0, nfe=128))
    with metrics.track("/v1/completions") as track:
        track.see(Started(0, 2))
        track.see(Draft(0, 2, (0, 3), ("Hel", "lo", None), (0, 1, None), (1.0, 1.0, None)))
    values = read(metrics)
    assert (values["llada_prompt_tokens_total"], values["llada_completion_tokens_total"]) == (302, 2)
    assert (values["llada_forwards_total"], values["llada_tokens_per_forward_count"]) == (128, 0)


def test_a_client_that_went_away_is_499() -> None:
    metrics = GatewayMetrics()
    with pytest.raises(RuntimeError), metrics.track("/v1/completions"):
        raise RuntimeError
    assert 'llada_requests_total{route="/v1/completions",status="499"} 1.0' in metrics.render().decode()
    assert read(metrics)["llada_requests_queued"] == 0
