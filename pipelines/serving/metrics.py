"""The endpoint's own numbers in Prometheus' text format: what the gateway sees of requests, and what the replicas tell it of
their engines (reports.py). Ray's (replicas, queues, GPUs) are on Ray's metrics ports."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llada.sampling.events import Draft, Finished, Started, Text
from pipelines.serving.events import HandedOn, ReplicaEvent, Restarted, Serving
from pipelines.serving.keys import Account
from pipelines.serving.reports import ReplicaReports

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS_PER_FORWARD = (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


class GatewayMetrics:
    """Counters of one gateway process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reports = ReplicaReports()
        self.registry.register(self.reports)
        kinds: dict[str, Any] = {"registry": self.registry, "namespace": "llada"}
        self.requests = Counter(
            "requests", "Answered requests by route and HTTP status", ["route", "status"], **kinds
        )
        self.of_version = Counter(
            "version_requests",
            "Requests that a model has taken, by its name, version and HTTP status; and of a canary those that it could not answer, "
            "which the stable version got",
            ["model", "version", "status"],
            **kinds,
        )
        self.version_latency = Histogram(
            "version_seconds",
            "From such a request to its last byte",
            ["model", "version"],
            buckets=_SECONDS,
            **kinds,
        )
        self.retries = Counter("retries", "Requests begun anew, as their replica has died", **kinds)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts and suffixes", **kinds)
        self.completion_tokens = Counter("completion_tokens", "Tokens of replies, up to their ends", **kinds)
        self.forwards = Counter("forwards", "Forwards of the network", **kinds)
        self.running = Gauge("requests_running", "Requests being denoised", **kinds)
        self.queued = Gauge("requests_queued", "Requests waiting for a replica", **kinds)
        self.speed = Histogram(
            "tokens_per_forward", "Of each finished reply with tokens", buckets=_TOKENS_PER_FORWARD, **kinds
        )
        self.latency = Histogram(
            "request_seconds", "From the request to its last byte", ["route"], buckets=_SECONDS, **kinds
        )
        self.first_text = Histogram(
            "first_text_seconds", "From the request to its first text", ["route"], buckets=_SECONDS, **kinds
        )

    def track(
        self, route: str, notes: dict[str, Any] | None = None, account: Account | None = None
    ) -> RequestTrack:
        """Follow one request: `with metrics.track(route) as track`; its numbers go into `notes` and to its key's account."""
        return RequestTrack(self, route, {} if notes is None else notes, account)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class RequestTrack:
    """Keeps the numbers right however a request ends; `status` 499 (as nginx has it) is a client that went away."""

    def __init__(
        self, metrics: GatewayMetrics, route: str, notes: dict[str, Any], account: Account | None
    ) -> None:
        self.metrics, self.route, self.status, self.notes = metrics, route, 499, notes
        self._account = account
        self._version: str | None = None
        self.model = ""
        """Known when the body is."""
        self._count = {"prompt_tokens": 0, "completion_tokens": 0, "forwards": 0}
        self._open: dict[
            int, dict[str, int]
        ] = {}  # of choices that are not finished, by what their last event says
        self._gauge: Gauge | None = None
        self._is_first = True

    def __enter__(self) -> RequestTrack:
        self._began = time.monotonic()
        return self

    def wait(self) -> None:
        """Its body has come and is good: from now on it is in the queue, or runs."""
        self._move(self.metrics.queued)

    def see(self, event: ReplicaEvent) -> None:
        """Count an event of the request's replies."""
        metrics = self.metrics
        if isinstance(event, Serving):
            self._version = event.version
        elif isinstance(event, HandedOn):
            metrics.of_version.labels(self.model, event.version, str(event.status)).inc()
            self._version = None
        elif isinstance(event, Started):
            self._move(metrics.running)
            self._open[event.index] = {"prompt_tokens": event.prompt_tokens, "completion_tokens": 0}
        elif isinstance(event, Restarted):
            metrics.retries.inc()
            self._move(metrics.queued)
            self._count = dict.fromkeys(self._count, 0)
            self._open.clear()
        elif isinstance(event, Text):
            if event.index in self._open and event.completion_tokens:
                self._open[event.index]["completion_tokens"] = event.completion_tokens
            if event.text and event.completion_tokens and self._is_first:  # an echo is none of the model's
                self._is_first = False
                self.notes["first_text_s"] = round(time.monotonic() - self._began, 4)
                metrics.first_text.labels(self.route).observe(time.monotonic() - self._began)
        elif isinstance(event, Draft):
            if event.index in self._open:
                written = sum(token is not None for token in event.tokens)
                self._open[event.index]["completion_tokens"] = written
        elif isinstance(event, Finished):
            self._open.pop(event.index, None)
            self._add(event.prompt_tokens, event.completion_tokens, event.nfe)
            if event.nfe and event.completion_tokens:  # not of likelihoods
                metrics.speed.observe(event.completion_tokens / event.nfe)

    def _move(self, gauge: Gauge | None) -> None:
        if self._gauge is not None:
            self._gauge.dec()
        if gauge is not None:
            gauge.inc()
        self._gauge = gauge

    def _add(self, prompt_tokens: int, completion_tokens: int, forwards: int = 0) -> None:
        self.metrics.prompt_tokens.inc(prompt_tokens)
        self.metrics.completion_tokens.inc(completion_tokens)
        self.metrics.forwards.inc(forwards)
        self._count["prompt_tokens"] += prompt_tokens
        self._count["completion_tokens"] += completion_tokens
        self._count["forwards"] += forwards

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._move(None)
        for unfinished in self._open.values():  # who leaves in the middle has had so much
            self._add(**unfinished)
        self.metrics.requests.labels(self.route, str(self.status)).inc()
        self.metrics.latency.labels(self.route).observe(time.monotonic() - self._began)
        if self._version is not None:
            self.metrics.of_version.labels(self.model, self._version, str(self.status)).inc()
            seconds = time.monotonic() - self._began
            self.metrics.version_latency.labels(self.model, self._version).observe(seconds)
            self.notes |= {"version": self._version or None}
        self.notes |= {"model": self.model or None, "status": self.status, **self._count}
        if self._account is not None:
            self._account.charge(self._count["prompt_tokens"] + self._count["completion_tokens"])
