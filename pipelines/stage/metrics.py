"""The record of a training run: what it has said of its steps.

While the run is under way, the record is a folder `metrics` of numbered parts, JSON lines in the order in which they were
said. Worker 0 writes them from a thread of its own; no step waits for a store, and a store that is away is tried again. What
stands there is never taken back: each attempt has parts of its own and says first from which step on it goes (RunStarted),
and by that readers know what earlier lines say of steps that were done again. A finished run has one plain metrics.jsonl.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict

from llada.files import exists, file_sizes, filesystem, join, read_bytes, storage_errors, write_bytes
from llada.training.events import (
    CheckpointDue,
    CheckpointFailed,
    CheckpointSkipped,
    Event,
    RolledBack,
    RunStarted,
    Sampled,
    StepDone,
    StepSkipped,
    Validated,
    event_from_json,
    event_to_json,
)

METRICS_FILE = "metrics.jsonl"
PARTS = "metrics"
# How stale the record may be for somebody who watches it.
METRICS_EVERY_S = 10.0
# The last part is written whole again as it grows, since object stores cannot append.
PART_LINES = 500
# Kept in memory while the store is away.
BUFFERED_LINES = 200_000
CLOSE_TIMEOUT_S = 30.0

Logged = StepDone | StepSkipped | RolledBack | Validated | Sampled

log = logging.getLogger(__name__)


class MetricsRecord:
    """Writes the record. Nothing here raises or waits, but what a checkpoint waits for."""

    def __init__(self, output: str, every_s: float = METRICS_EVERY_S) -> None:
        self.url, self.every_s = join(output, PARTS), every_s
        self._changed = threading.Condition()
        self._new: list[str] = []
        self._said = self._written = self._rounds = 0
        self._is_asked = self._is_closed = False
        self._error: Exception | None = None
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def add(self, event: Event) -> None:
        """Take an event; it is written within `every_s` seconds.

        At CheckpointDue, wait until all that was said is in the store: the record must not be behind a checkpoint. Then,
        raises StoreError when it cannot be written.
        """
        match event:
            case CheckpointDue():
                self.flush()
            case CheckpointSkipped() | CheckpointFailed():
                pass
            case _ if self._said - self._written >= BUFFERED_LINES:
                self._warn(f"{self.url} cannot be written and the buffer is full: metrics are dropped")
            case _:
                with self._changed:
                    self._new.append(json.dumps(event_to_json(event)) + "\n")
                    self._said += 1
                    if self._thread.ident is None:
                        self._thread.start()

    def flush(self) -> None:
        """Wait until all that was said is in the store. Raises StoreError when it cannot be written."""
        with self._changed:
            said, rounds = self._said, self._rounds
            self._ask()
            # A round that is under way may not hold the last line.
            self._changed.wait_for(lambda: self._written >= said or self._rounds >= rounds + 2)
            if self._written < said and self._error is not None:
                raise self._error

    def close(self) -> None:
        """Write what is left; waits a while for it."""
        with self._changed:
            self._is_closed = True
            self._ask()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _ask(self) -> None:
        self._is_asked = True
        self._changed.notify_all()

    def _run(self) -> None:
        attempt, number, is_last = 0, 0, False
        part: list[str] = []
        while not is_last:
            with self._changed:
                part += self._new
                self._new, said, self._is_asked, is_last = [], self._said, False, self._is_closed
            error = None
            try:
                with storage_errors(self.url):
                    if said > self._written:
                        attempt = attempt or 1 + max((name[0] for name in _parts(self.url)), default=0)
                        number = self._write(attempt, number, part)
            except Exception as failure:
                error = failure
                self._warn(f"{self.url} could not be written and is tried again: {failure}")
            with self._changed:
                self._error, self._rounds = error, self._rounds + 1
                self._written = self._written if error else said
                self._changed.notify_all()
                if not is_last:
                    self._changed.wait_for(lambda: self._is_asked, self.every_s)

    def _write(self, attempt: int, number: int, part: list[str]) -> int:
        """Write the last part and, where it has become too long, new ones; leaves the lines of the last one, whose number
        it returns."""
        while True:
            text = "".join(part[:PART_LINES])
            write_bytes(join(self.url, _name(attempt, number)), text.encode())
            if len(part) < PART_LINES:
                return number
            number += 1
            del part[:PART_LINES]

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            log.warning("%s", text)
        self._warned.add(text)


def read_metrics(output: str) -> list[StepDone | Validated]:
    """The logged losses and validations of a training folder, in order, of a run under way too."""
    return [event for event in read_record(output) if isinstance(event, StepDone | Validated)]


def read_record(output: str) -> list[Logged]:
    """All that is said of the steps of a run, in order; each step once, however often it was done."""
    events: list[Logged] = []
    urls = [
        join(output, METRICS_FILE),
        *(join(output, PARTS, _name(*part)) for part in _parts(join(output, PARTS))),
    ]
    for event in (event for url in urls for event in _read(url)):
        if isinstance(event, RunStarted):
            # After a crash, or a return to a checkpoint, the steps since then are done again.
            events = [earlier for earlier in events if earlier.step <= event.first_step]
        elif isinstance(event, Logged):
            events.append(event)
    return events


def merge_metrics(output: str) -> None:
    """Make the record of a finished run one plain file."""
    lines = [json.dumps(event_to_json(event)) + "\n" for event in read_record(output)]
    write_bytes(join(output, METRICS_FILE), "".join(lines).encode())
    if exists(join(output, PARTS)):
        fs, path = filesystem(join(output, PARTS))
        try:
            fs.rm(path, recursive=True)
        except (
            Exception
        ) as error:  # without the right to delete, say: readers take each step once all the same
            log.warning("%s could not be deleted: %s", join(output, PARTS), error)


def _name(attempt: int, number: int) -> str:
    return f"{attempt:06d}-{number:06d}.jsonl"


def _parts(url: str) -> list[tuple[int, int]]:
    """The attempt and the number of each part in the folder `url`, in order."""
    found = (re.fullmatch(r"(\d+)-(\d+)\.jsonl", name) for name in file_sizes(url))
    return sorted((int(match[1]), int(match[2])) for match in found if match)


def _read(url: str) -> Iterator[Event]:
    try:
        lines = read_bytes(url).splitlines()
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, start=1):
        try:
            yield event_from_json(json.loads(line))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            log.warning("%s:%d is no event (%s) and is left out", url, number, error)


def points_of(event: Event) -> dict[str, float]:
    """What MLflow shows of an event, by the names of its metrics; nothing of those that say nothing of a step."""
    match event:
        case StepDone() | Validated():
            prefix = "train" if isinstance(event, StepDone) else "validation"
            values = {name: value for name, value in asdict(event).items() if name != "step"}
            if isinstance(event, StepDone):
                levels, tokens = values.pop("noise_nats"), values.pop("noise_tokens")
                width = 100 // max(1, len(levels))  # percent of the tokens masked
                values |= {
                    f"noise_nats.{number * width}-{(number + 1) * width}": nats
                    for number, nats in enumerate(levels)
                    if tokens[number]
                }
            return {f"{prefix}.{name}": float(value) for name, value in values.items()}
        case StepSkipped():
            return {"train.skipped": 1.0}
        case RolledBack():
            return {"train.rolled_back_to": event.step, "train.lr_scale": event.lr_scale}
    return {}


def step_of(event: Logged) -> int:
    """The step at which MLflow shows it: that of a return to a checkpoint is the one that it returned from."""
    return event.diverged_at if isinstance(event, RolledBack) else event.step
