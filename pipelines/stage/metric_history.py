"""What an MLflow run has been told of its metrics. MLflow cannot delete a point, so each is told once: after a crash the
steps since the last checkpoint are done, and logged, again.

The metrics that are logged together are one request, which MLflow takes whole or not at all: the history of the first of
them says which steps it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipelines.stage.metrics import points_of, read_record, step_of

METRICS_PER_BATCH = 1000


class MetricHistory:
    """The metrics of one run.

    Args:
        is_new: the run has no metrics yet.
    """

    def __init__(self, client: Any, run_id: str, *, is_new: bool) -> None:
        self.client, self.run_id, self.is_new = client, run_id, is_new
        self._told: dict[str, set[int]] = {}
        self._redone_after: float = math.inf

    def log(self, values: Mapping[str, float], step: int, timestamp: int) -> None:
        """Tell the metrics of a step, unless the run has been told of that step. `timestamp` is in milliseconds."""
        self._log([(step, values)], timestamp)

    def log_record(self, output: str, timestamp: int) -> None:
        """Tell what the record of a training folder has and the run lacks: what was lost on the way, with a driver say."""
        self._log([(step_of(event), points_of(event)) for event in read_record(output)], timestamp)

    def redo(self, after: int) -> None:
        """The steps after this one are done again, in another way: what is said of them then is told too."""
        self._redone_after = min(self._redone_after, after)
        for steps in self._told.values():
            steps.difference_update([step for step in steps if step > after])

    def _log(self, points: list[tuple[int, Mapping[str, float]]], timestamp: int) -> None:
        batch: list[tuple[int, Mapping[str, float]]] = []
        for step, values in points:
            if not values or step in self._steps(values):
                continue
            if sum(len(others) for _, others in batch) + len(values) > METRICS_PER_BATCH:
                self._send(batch, timestamp)
                batch = []
            batch.append((step, values))
        self._send(batch, timestamp)

    def _send(self, batch: list[tuple[int, Mapping[str, float]]], timestamp: int) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, timestamp, step) for step, values in batch for name, value in values.items()
        ]
        if metrics:
            self.client.log_batch(self.run_id, metrics=metrics)
        for step, values in batch:
            self._steps(values).add(step)

    def _steps(self, values: Mapping[str, float]) -> set[int]:
        """Those of which these metrics were told."""
        name = next(iter(values))
        if name not in self._told:
            history = [] if self.is_new else self.client.get_metric_history(self.run_id, name)
            self._told[name] = {point.step for point in history if point.step <= self._redone_after}
        return self._told[name]
