"""The record of a run: never behind a checkpoint, each step once, whatever dies or is away."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from llada.errors import UserError
from llada.training.events import (
    CheckpointDue,
    Event,
    RolledBack,
    RunStarted,
    StepDone,
    StepSkipped,
    Validated,
)
from pipelines.stage import metrics
from pipelines.stage.metrics import (
    METRICS_FILE,
    PARTS,
    MetricsRecord,
    merge_metrics,
    points_of,
    read_metrics,
    read_record,
    step_of,
)


def start(first_step: int) -> RunStarted:
    return RunStarted(first_step, 8, 1000, 5.25, "float32", 1)


def step(number: int) -> StepDone:
    return StepDone(number, 6.5 - number / 100, 0.0008, 1.5, 2048 * number, 13734.5, 0.25)


def record(output: Path, *events: Event) -> None:
    """What one attempt says."""
    writer = MetricsRecord(str(output))
    for event in events:
        writer.add(event)
    writer.close()


def steps(output: Path) -> list[int]:
    return [event.step for event in read_metrics(str(output))]


def waits(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_no_record_is_an_empty_one(tmp_path):
    assert read_metrics(str(tmp_path)) == []


def test_all_that_was_said_before_a_checkpoint_is_there_and_byte_for_byte(tmp_path):
    writer = MetricsRecord(str(tmp_path), every_s=3600)
    writer.add(start(0))
    assert waits(lambda: any(tmp_path.glob(f"{PARTS}/*")))  # the first line at once
    writer.add(Validated(4, 6.78093521296978, 1.25))
    writer.add(step(8))
    assert steps(tmp_path) == []
    writer.add(CheckpointDue(8))
    assert read_metrics(str(tmp_path)) == [Validated(4, 6.78093521296978, 1.25), step(8)]
    merge_metrics(str(tmp_path))
    assert (tmp_path / METRICS_FILE).read_text() == (
        '{"event": "validation", "step": 4, "loss": 6.78093521296978, "ratio": 1.25, "averaged": false}\n'
        '{"event": "step", "step": 8, "loss": 6.42, "lr": 0.0008, "grad_norm": 1.5, "tokens": 16384, '
        '"tokens_per_second": 13734.5, "mfu": 0.25, "tokens_per_second_per_worker": 0.0, "data_wait": 0.0, '
        '"allocated_gib": 0.0, "reserved_gib": 0.0, "skipped_steps": 0, "noise_nats": [], "noise_tokens": []}\n'
    )
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_the_thread_writes_without_being_asked(tmp_path):
    writer = MetricsRecord(str(tmp_path), every_s=0.01)
    for number in range(1, 4):
        writer.add(step(number))
        assert waits(lambda number=number: steps(tmp_path) == list(range(1, number + 1)))


def test_a_long_record_has_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "PART_LINES", 3)
    writer = MetricsRecord(str(tmp_path), every_s=3600)
    done: list[int] = []
    for more in (1, 2, 3, 7, 2):  # ends of parts are met and passed
        for _ in range(more):
            done.append(len(done) + 1)
            writer.add(step(done[-1]))
        writer.flush()
        assert steps(tmp_path) == done
    assert max(len(path.read_text().splitlines()) for path in tmp_path.glob(f"{PARTS}/*")) == 3


def test_steps_that_are_done_again_are_there_once(tmp_path):
    """After a crash from the checkpoint of step 4, and once more from one of step 2 (that of step 4 was damaged)."""
    record(tmp_path, start(0), step(2), step(4), step(6))
    record(tmp_path, start(4), step(6))
    assert steps(tmp_path) == [2, 4, 6]
    record(tmp_path, start(2), step(4), step(6), step(8))
    assert steps(tmp_path) == [2, 4, 6, 8]
    record(tmp_path, start(8))
    assert steps(tmp_path) == [2, 4, 6, 8]


def test_a_worker_that_was_given_up_and_still_writes_changes_nothing(tmp_path):
    old, new = MetricsRecord(str(tmp_path)), MetricsRecord(str(tmp_path))
    for event in (start(0), step(2), step(4)):
        old.add(event)
    old.flush()
    for event in (start(2), step(4)):
        new.add(event)
    new.flush()
    old.add(step(6))
    old.flush()
    new.add(step(6))
    new.flush()
    assert steps(tmp_path) == [2, 4, 6]


def test_a_return_to_a_checkpoint_is_in_the_record(tmp_path):
    """What was said of the steps that are done again is gone, that and why they are done again is not."""
    bad = [StepSkipped(number, float("nan"), 1.0) for number in (7, 8)]
    record(tmp_path, start(0), step(4), step(6), *bad, RolledBack(4, 8, 0.5), start(4), step(6))
    assert [event.name for event in read_record(str(tmp_path))] == ["step", "rolled_back", "step"]
    assert steps(tmp_path) == [4, 6]


def test_a_finished_run_that_goes_on_keeps_what_it_has(tmp_path):
    """Also where the end was cut short between the plain file and the parts it replaces."""
    record(tmp_path, start(0), step(2), step(4))
    (part,) = tmp_path.glob(f"{PARTS}/*")
    text = part.read_text()
    merge_metrics(str(tmp_path))
    part.parent.mkdir()
    part.write_text(text)
    assert steps(tmp_path) == [2, 4]
    merge_metrics(str(tmp_path))
    record(tmp_path, start(4), step(6))
    merge_metrics(str(tmp_path))
    assert steps(tmp_path) == [2, 4, 6]


def test_where_nobody_may_delete_a_run_ends_and_goes_on_all_the_same(tmp_path, monkeypatch, caplog):
    def refuse(self: LocalFileSystem, path: str, **options: bool) -> None:
        raise PermissionError(13, "no right to delete")

    monkeypatch.setattr(LocalFileSystem, "rm", refuse)
    record(tmp_path, start(0), step(2), step(4), RolledBack(2, 4, 0.5), start(2), step(4))
    merge_metrics(str(tmp_path))
    assert "could not be deleted" in caplog.text
    assert [event.name for event in read_record(str(tmp_path))] == ["step", "rolled_back", "step"]
    record(tmp_path, start(4), step(6))
    merge_metrics(str(tmp_path))
    assert steps(tmp_path) == [2, 4, 6]


def test_a_damaged_line_is_left_out_and_named(tmp_path, caplog):
    record(tmp_path, step(8))
    merge_metrics(str(tmp_path))
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"event": "st\n{"event": "other"}\n\xff\n')
    assert read_metrics(str(tmp_path)) == [step(8)]
    named = [f"{METRICS_FILE}:{number} is no event" in caplog.text for number in (1, 2, 3, 4)]
    assert named == [False, *[True] * 3]


def test_a_store_that_is_away_costs_no_point_and_only_a_checkpoint_waits_for_it(tmp_path, caplog):
    (tmp_path / PARTS).write_text("a file in the way")
    writer = MetricsRecord(str(tmp_path), every_s=0.05)
    for number in (2, 4, 6):
        writer.add(step(number))
    with pytest.raises(UserError, match="a file is in the way"):
        writer.add(CheckpointDue(6))
    assert caplog.text.count("is tried again") == 1
    (tmp_path / PARTS).unlink()
    writer.add(step(8))
    assert waits(lambda: steps(tmp_path) == [2, 4, 6, 8])
    writer.add(CheckpointDue(8))


def test_a_full_buffer_is_told_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(metrics, "BUFFERED_LINES", 2)
    (tmp_path / PARTS).write_text("a file in the way")
    writer = MetricsRecord(str(tmp_path), every_s=3600)
    for number in range(5):
        writer.add(step(number))
    assert caplog.text.count("metrics are dropped") == 1


def test_whatever_the_moment_of_a_crash_each_step_is_there_once(tmp_path):
    """Events come at random while parts are written; a crash is a writer that is left alone with what it has not written,
    and the next attempt begins at a checkpoint."""
    draw = random.Random(0)
    checkpoint = 0
    while checkpoint < 60:
        writer = MetricsRecord(str(tmp_path), every_s=0.001)
        writer.add(start(checkpoint))
        for number in range(checkpoint + 1, checkpoint + draw.randint(2, 30)):
            writer.add(step(number))
            if number % 5 == 0:
                writer.add(CheckpointDue(number))
                checkpoint = number
            time.sleep(draw.choice([0, 0, 0.002]))
        writer.every_s = 3600  # dead, as far as anybody can see
    assert steps(tmp_path)[:checkpoint] == list(range(1, checkpoint + 1))


def test_what_mlflow_shows_of_an_event():
    assert points_of(start(0)) == {}
    assert points_of(Validated(4, 6.5, 1.25)) == {
        "validation.loss": 6.5,
        "validation.ratio": 1.25,
        "validation.averaged": 0.0,
    }
    assert points_of(step(4)).items() >= {"train.loss": 6.46, "train.lr": 0.0008, "train.mfu": 0.25}.items()
    assert not [name for name in points_of(step(4)) if "noise" in name]  # it masks nothing
    levels = replace(step(4), noise_nats=(3.0, 0.0, 5.0, 6.0), noise_tokens=(7, 0, 8, 9))
    assert {name: value for name, value in points_of(levels).items() if "noise" in name} == {
        "train.noise_nats.0-25": 3.0,
        "train.noise_nats.50-75": 5.0,
        "train.noise_nats.75-100": 6.0,
    }
    assert points_of(StepSkipped(7, float("nan"), 1.0)) == {"train.skipped": 1.0}
    back = RolledBack(4, 8, 0.5)
    assert (step_of(back), points_of(back)) == (8, {"train.rolled_back_to": 4, "train.lr_scale": 0.5})


def test_many_threads_may_speak(tmp_path):
    writer = MetricsRecord(str(tmp_path), every_s=0.001)
    threads = [
        threading.Thread(target=lambda first=first: [writer.add(step(n)) for n in range(first, first + 100)])
        for first in (0, 100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert sorted(steps(tmp_path)) == list(range(200))
    assert json.loads(next(tmp_path.glob(f"{PARTS}/*")).read_text().splitlines()[0])["event"] == "step"
