"""The benchmark of the endpoint runs, and its profiles are read rightly."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_profile_is_summed_up_by_where_the_samples_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    serving = importlib.import_module("serving")
    inside = "/env/lib/python3.11/site-packages"
    stacks = (
        f"main (/x/run.py:1);send ({inside}/ray/serve/_private/proxy.py:12) 3\n"
        "main (/x/run.py:1);dumps (/usr/lib/python3.11/json/encoder.py:7) 1\n"
        "main (/x/run.py:1);stream (/clone/pipelines/serving/gateway.py:9) 4\n"
    )
    assert serving.summarise(stacks) == {
        "packages": {"pipelines/serving": 50.0, "ray/serve": 37.5, "json/encoder": 12.5},
        "functions": {
            "pipelines/serving: stream": 50.0,
            "ray/serve: send": 37.5,
            "json/encoder: dumps": 12.5,
        },
    }


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_an_endpoint_is_measured(tmp_path: Path) -> None:
    script = Path(__file__).with_name("serving.py")
    for name in ("before", "now"):
        command = [sys.executable, script, "--quick", "--as", name, "--results", tmp_path]
        subprocess.run(command, check=True)
    report = json.loads((tmp_path / "serving.json").read_text())
    assert set(report) == {"before", "now"}
    for entry in report.values():
        # There is no proxy here any more.
        assert {part for part, ms in entry["request_ms"].items() if ms > 0} == {"gateway", "replica", "all"}
        assert entry["full"]["statuses"]["429"] > 0
        assert entry["held"]["errors"] == 0
        assert {*entry["profile"]["request"]} == {"gateway", "replica"}
