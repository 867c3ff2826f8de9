"""Dashboards and alerts: well-formed, and each number in them is one that a process of ours, of Ray's or of Kubernetes' says.

The numbers of Serve: tests/pipelines/test_serve.py, where one runs.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from llada.training.events import RunStarted
from pipelines.runners.gauges import TASKS, TRAINING, TrainingGauges
from pipelines.runners.tasks import TaskRun
from pipelines.serving.metrics import GatewayMetrics
from pipelines.stage.cluster import ClusterConfig

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "monitoring"
DASHBOARDS = sorted((FOLDER / "dashboards").glob("*.json"))
ALERTS = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["spec"]["groups"]
    for rule in group["rules"]
]
# Of kube-state-metrics, which kube-prometheus-stack brings along (its docs/metrics/workload).
OF_KUBERNETES = {
    "kube_cronjob_status_active",
    "kube_cronjob_status_last_successful_time",
    "kube_job_status_failed",
}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_one_that_grafana_shows(path: Path):
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == f"llada-{path.stem}"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] in ("row", "timeseries", "stat", "gauge")
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert [target["refId"] for target in panel["targets"]] == list("ABCD"[: len(panel["targets"])])


def test_alerts_say_whom_what_and_what_to_do():
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "remedy"}, rule["alert"]


def test_the_numbers_of_the_endpoint(metrics_shown: Callable[[str], set[str]]):
    families = text_string_to_metric_families(_after_a_request().decode())
    said = {sample.name for family in families for sample in family.samples}
    shown = metrics_shown("llada_")
    assert len(shown) > 6
    assert shown <= said


def _after_a_request() -> bytes:
    metrics = GatewayMetrics()
    with metrics.track("/v1/completions") as track:
        track.metrics.first_text.labels(track.route).observe(1)
        track.status = 200
    return metrics.render()


def test_the_numbers_of_kubernetes(metrics_shown: Callable[[str], set[str]]):
    known = ("llada_", "ray_")
    assert {name for name in metrics_shown("") if not name.startswith(known)} == OF_KUBERNETES


@pytest.mark.integration
def test_the_numbers_of_ray_and_of_our_stages(
    metrics_shown: Callable[[str], set[str]], scrape: Callable[..., dict[str, float]], tmp_path: Path
):
    """As this Ray says them while a step of preparation is under way; those of GPUs and of an autoscaler, of which there are none
    here, as its code names them."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    TrainingGauges("toy").show(RunStarted(0, 8, 1000, 5.25, "float32", 1))
    run, scraped = TaskRun(ClusterConfig(), progress=False), tmp_path / "scraped"
    step = threading.Thread(target=run.step, args=("toy", partial(_wait_for, scraped), range(3)))
    step.start()
    ours = {f"ray_llada_train_{name}" for name in TRAINING} | {f"ray_llada_prepare_{name}" for name in TASKS}
    shown = {name for name in metrics_shown("ray_") if not name.startswith("ray_serve_")}
    assert len(shown) > 20
    absent = ("gpu", "gram", "cluster_active_nodes")
    of_others = {f"ray_{name}" for name in METRICS_GAUGES if any(part in name for part in absent)}
    try:
        scrape("ray_llada_prepare_tasks_done", *(shown - ours - of_others))  # waits until they are all there
    finally:
        scraped.touch()
        step.join()
    assert {name for name in shown if name.startswith("ray_llada_")} <= ours


def _wait_for(path: Path, number: int) -> int:
    deadline = time.monotonic() + 240
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return number
