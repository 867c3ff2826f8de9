"""What the front process loads and says of its health. (Its way to the replicas is exercised over HTTP in
tests/pipelines/test_serve.py.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ReplicaState,
    ServeStatus,
)

from pipelines.serve import APP_NAME
from pipelines.serving.gateway import Replicas
from pipelines.serving.routes import Health

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_front_process_needs_no_torch() -> None:
    """It starts fast and stays small; the same holds for parsing a body."""
    code = (
        "import sys\n"
        "import pipelines.serving.gateway\n"
        "from pipelines.serving.dialects.body import parse_body\n"
        "from pipelines.serving.dialects.chat import ChatBody\n"
        'parse_body(ChatBody, b\'{"messages": [{"role": "user", "content": "x"}], "remasking": "random"}\')\n'
        "print(sorted({'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


class Handle:
    """As much of Ray's handle of a deployment as the gateway's health needs."""

    app_name, deployment_name = APP_NAME, "Denoiser"

    def options(self, **_: Any) -> Handle:
        return self


def serve_says(
    state: DeploymentStatus, *, running: int, application: ApplicationStatus = ApplicationStatus.RUNNING
) -> ServeStatus:
    """Serve's own account, with the traceback that it keeps of a replica that did not start."""
    message = 'Traceback (most recent call last):\n  File "/home/somebody/serve.py", line 3\nKeyError: secret'
    trigger = DeploymentStatusTrigger.REPLICA_STARTUP_FAILED
    replicas = {ReplicaState.RUNNING: running} if running else {ReplicaState.STARTING: 1}
    denoiser = DeploymentStatusOverview(state, trigger, replicas, message)
    return ServeStatus(
        applications={
            APP_NAME: ApplicationStatusOverview(application, message, 0.0, {Handle.deployment_name: denoiser})
        }
    )


@pytest.mark.parametrize(
    ("state", "running", "word"),
    [
        (DeploymentStatus.HEALTHY, 1, "ok"),
        (DeploymentStatus.HEALTHY, 0, "ok"),  # meant to have none now
        (DeploymentStatus.UPDATING, 1, "ok"),
        (DeploymentStatus.UPDATING, 0, "starting"),
        (DeploymentStatus.UNHEALTHY, 0, "unavailable"),
        (DeploymentStatus.DEPLOY_FAILED, 0, "unavailable"),
    ],
)
def test_health_is_a_word_and_a_reason_that_a_stranger_may_read(
    monkeypatch: pytest.MonkeyPatch, state: DeploymentStatus, running: int, word: str
) -> None:
    replicas = Replicas(Handle(), 5)  # type: ignore[arg-type]
    assert replicas.health().status == "starting"
    monkeypatch.setattr(serve, "status", lambda: serve_says(state, running=running))
    replicas.look()
    health = replicas.health()
    assert health.status == word
    assert (health.reason is None) == (word == "ok")
    assert not any(told in str(health.reason) for told in ("/", "Traceback", "secret", "\n"))


def test_asking_for_the_health_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's controller takes seconds when it is busy, and may be away: what was seen last stays."""
    asked = 0

    def status() -> ServeStatus:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise TimeoutError("the controller is busy")
        return serve_says(DeploymentStatus.HEALTHY, running=1)

    monkeypatch.setattr(serve, "status", status)
    replicas = Replicas(Handle(), 5)  # type: ignore[arg-type]
    replicas.look()
    assert [replicas.health() for _ in range(100)] == [Health("ok")] * 100
    assert asked == 1
    replicas.look()
    assert (asked, replicas.health()) == (2, Health("ok"))
    deleting = serve_says(DeploymentStatus.HEALTHY, running=1, application=ApplicationStatus.DELETING)
    monkeypatch.setattr(serve, "status", lambda: deleting)
    replicas.look()
    assert replicas.health().status == "draining"
