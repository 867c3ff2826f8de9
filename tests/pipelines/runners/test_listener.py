"""What the driver shows and tells MLflow: each step once, whoever dies on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from llada.training.events import Event, RolledBack, RunStarted, StepDone, StepSkipped, Validated
from llada.training.watch import Hang
from pipelines.runners import listener as listener_module
from pipelines.runners.channel import FileChannel
from pipelines.runners.listener import HungWorker, Listener, Reporter
from pipelines.runners.worker_error import WorkerError
from pipelines.stage.delivery import EXPERIMENT, open_client
from pipelines.stage.metrics import MetricsRecord, merge_metrics, read_metrics
from pipelines.stage.tracking import Tracker

pytestmark = pytest.mark.integration


def start(first_step: int, workers: int = 1) -> RunStarted:
    return RunStarted(first_step, 8, 1000, 5.25, "float32", workers)


def step(number: int, loss: float | None = None) -> StepDone:
    return StepDone(number, loss or 6.5 - number / 100, 0.0008, 1.5, 2048 * number, 13734.5, 0.25)


class Worker:
    """Says the same to the record and to the driver, as worker 0 does."""

    def __init__(self, output: Path, listener: Listener) -> None:
        self.record, self.listener = MetricsRecord(str(output)), listener

    def say(self, *events: Event) -> None:
        for event in events:
            self.record.add(event)
            self.listener.events.put(event)
        self.record.flush()


def attend(output: Path, uri: str) -> Listener:
    tracker = Tracker(uri, "sft", str(output))
    return Listener(FileChannel(), tracker, "toy", progress=False, log_folder=str(output))


def history(output: Path, uri: str, name: str) -> list[tuple[int, float]]:
    client = open_client(uri)
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    (run,) = [run for run in runs if run.data.tags["output"] == str(output)]
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))


def test_each_step_is_told_once_after_crashes_of_worker_and_driver(tmp_path, tracking_uri):
    output, uri = tmp_path / "out", tracking_uri
    with attend(output, uri) as listener:
        Worker(output, listener).say(start(0), step(2), step(4), Validated(4, 6.0, 1.1), step(6))
        Worker(output, listener).say(start(4), step(6))  # the worker died after the checkpoint of step 4
    listener.tracker.close("FAILED")
    lost = attend(output, uri)  # a driver that dies before it has told anything
    Worker(output, lost).say(start(4), step(6), step(8))
    lost.events.remove()
    with attend(output, uri) as listener:
        listener.tracker.log_record()  # as begin_training does
        Worker(output, listener).say(start(6, workers=3), step(8), step(10), Validated(10, 5.0, 1.0))
    merge_metrics(str(output))
    listener.tracker.log_record()  # as finish_training does
    listener.tracker.close()
    losses = [(event.step, event.loss) for event in read_metrics(str(output)) if isinstance(event, StepDone)]
    assert [number for number, _ in losses] == [2, 4, 6, 8, 10]
    assert history(output, uri, "train.loss") == losses
    assert history(output, uri, "validation.loss") == [(4, 6.0), (10, 5.0)]
    assert history(output, uri, "run.workers") == [(0, 1), (4, 1), (6, 3)]


def test_what_is_done_again_in_another_way_is_told_again(tmp_path, tracking_uri, caplog):
    """After a return to a checkpoint the rates are lower, and the losses others."""
    output, uri = tmp_path / "out", tracking_uri
    with attend(output, uri) as listener:
        worker = Worker(output, listener)
        worker.say(start(0), step(2), step(4), step(6), StepSkipped(7, float("nan"), 1.0))
        worker.say(RolledBack(4, 7, 0.5), start(4), step(6, 9.0), step(8))
    merge_metrics(str(output))
    listener.tracker.log_record()
    listener.tracker.close()
    assert history(output, uri, "train.loss") == [(2, 6.48), (4, 6.46), (6, 6.44), (6, 9.0), (8, 6.42)]
    assert history(output, uri, "train.skipped") == [(7, 1.0)]
    assert history(output, uri, "train.rolled_back_to") == [(7, 4.0)]
    assert history(output, uri, "train.lr_scale") == [(7, 0.5)]
    assert "step 7 is skipped: its loss (nan)" in caplog.text
    assert "after step 7 back to the checkpoint of step 4" in caplog.text


def test_what_went_wrong_is_told_once_an_attempt_and_what_cannot_be_shown_holds_nothing_up(tmp_path, caplog):
    def failed(rank: int, message: str) -> WorkerError:
        return WorkerError(rank, "fault", message, "Traceback", 0.0)

    with Listener(FileChannel(), None, "toy", progress=False, log_folder=str(tmp_path)) as listener:
        for event in (start(0), "no event", 3, failed(1, "IndexError: 7"), failed(0, "connection closed")):
            listener.events.put(event)
        for rank in (0, 1):
            listener.events.put(HungWorker(rank, Hang("step", 61.0, 0.5, f"stacks of {rank}")))
        listener.events.put(start(4))
        listener.events.put(HungWorker(0, Hang("step", 62.0, 0.5, "stacks again")))
    said = [record.getMessage() for record in caplog.records if record.name == listener_module.__name__]
    assert said == [
        "toy: worker 1: IndexError: 7",
        "toy: the workers have started again, behind step 4",
        "toy: a step has not ended for 62 s, and usually takes 0.5 s: the workers are started again; what each of them "
        f"was at is in {tmp_path}/hangs.log",
    ]
    kept = (tmp_path / "hangs.log").read_text()
    assert all(
        text in kept for text in ("worker 0, step for 61 s\nstacks of 0", "stacks of 1", "stacks again")
    )


def test_a_worker_without_a_driver_goes_on():
    channel = FileChannel()
    channel.remove()
    reporter = Reporter(channel)
    reporter.tell(step(1))
    reporter.flush()  # nor does it wait for an answer
    assert not Path(channel.path).exists()
