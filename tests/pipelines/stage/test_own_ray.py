import contextlib
import socket
import time
from pathlib import Path

import psutil
import pytest

from pipelines.stage.own_ray import OWN_RAY, is_own_ray, own_node


def test_every_setting_is_one_that_this_ray_knows():
    """Ray takes any name without a word."""
    import ray

    package = Path(ray.__file__).parent
    raylet = (package / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()
    sources = "\n".join(
        path.read_text()
        for folder in ("_private", "dashboard", "train", "serve")
        for path in (package / folder).rglob("*.py")
    )
    unknown = [
        name
        for name in OWN_RAY
        if f'"{name}"' not in sources and f"\0{name.removeprefix('RAY_')}\0".encode() not in raylet
    ]
    assert unknown == []


@pytest.mark.integration
def test_its_agents_are_where_its_raylet_was_told(local_ray):
    node, deadline = own_node(), time.monotonic() + 120
    for port in (node.metrics_agent_port, node.dashboard_agent_listen_port, node.runtime_env_agent_port):
        while True:
            try:
                socket.create_connection((node.node_ip_address, port), timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, port
                time.sleep(0.2)


@pytest.mark.integration
def test_a_ray_of_our_own_has_only_the_processes_that_it_needs(local_ray):
    assert is_own_ray()
    words = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            words.append(" ".join(process.cmdline()))
    there = {
        name: any(name in each for each in words)
        for name in ("gcs_server", "raylet/raylet", "log_monitor.py", "monitor.py", "dashboard/dashboard.py")
    }
    assert there == {name: name in ("gcs_server", "raylet/raylet") for name in there}
