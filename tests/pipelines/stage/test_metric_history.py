"""MLflow's points: each step once, in few requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llada.training.events import RunStarted, StepDone
from pipelines.stage import metric_history
from pipelines.stage.delivery import Delivery
from pipelines.stage.metrics import MetricsRecord

pytestmark = pytest.mark.integration


@pytest.fixture
def opened(tmp_path: Path, tracking_uri: str) -> Callable[[], Delivery]:
    """opened() is the run of tmp_path/out, begun or gone on with."""

    def begin() -> Delivery:
        delivery = Delivery(tracking_uri, str(tmp_path / "out"))
        delivery.open("a run", {})
        return delivery

    return begin


def steps(delivery: Delivery, name: str) -> list[int]:
    return [point.step for point in delivery.client.get_metric_history(delivery.run_id, name)]


def test_a_step_is_told_once_by_whoever_goes_on(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(metric_history, "METRICS_PER_BATCH", 30)  # two steps
    record = MetricsRecord(str(tmp_path / "out"))
    record.add(RunStarted(0, 8, 1000, 5.25, "float32", 1))
    for number in range(1, 9):
        record.add(StepDone(number, 6.0, 1e-3, 1.5, 64, 64.0, 0.5))
    record.close()
    first = opened()
    for number in (2, 5, 5):
        first.history.log({"train.loss": 6.0, "train.lr": 1e-3}, number, timestamp=1)
    first.history.log_record(str(tmp_path / "out"), timestamp=2)
    assert sorted(steps(first, "train.loss")) == list(range(1, 9))
    second = opened()
    assert second.run_id == first.run_id
    second.history.log_record(str(tmp_path / "out"), timestamp=3)
    for number in (8, 9):
        second.history.log({"train.loss": 7.0}, number, timestamp=4)
    assert sorted(steps(second, "train.loss")) == list(range(1, 10))


def test_what_is_done_again_is_told_again(opened):
    first = opened()
    for number in (1, 2, 3):
        first.history.log({"loss": 1.0}, number, timestamp=1)
    second = opened()  # one that has not asked yet what was told
    second.history.redo(after=1)
    for number in (1, 2, 2, 3):
        second.history.log({"loss": 2.0}, number, timestamp=2)
    assert sorted(steps(second, "loss")) == [1, 2, 2, 3, 3]


def test_nothing_is_told_of_nothing(tmp_path, opened):
    delivery = opened()
    delivery.history.log({}, 1, timestamp=1)
    delivery.history.log_record(str(tmp_path / "none"), timestamp=1)
    assert delivery.client.get_run(delivery.run_id).data.metrics == {}
