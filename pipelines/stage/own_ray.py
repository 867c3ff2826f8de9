"""A Ray that this process starts for itself, on one machine, and ends: which of Ray's processes it is without, how seldom the
others look up, and its end.

Ray is made for a cluster that others look at and that grows. What only those need is left out here, because it takes a part of a
core all the time: together, more than what Ray adds to a training otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

# How long it may take to be up, on a machine that is busy with other things.
START_TIMEOUT_S = 300.0
# Ray's own limits are for machines that have nothing else to do.
PATIENT = {
    "RAY_worker_register_timeout_seconds": f"{START_TIMEOUT_S:.0f}",
    "RAY_agent_register_timeout_ms": f"{START_TIMEOUT_S * 1000:.0f}",
}
# What its processes do again and again, ten times a second some of it, and for whom.
_SELDOM = {
    # For an autoscaler: which tasks wait, and how many of a worker's.
    "RAY_gcs_pull_resource_loads_period_milliseconds": "60000",
    "RAY_report_worker_backlog_interval_ms": "60000",
    # For the dashboard: which tasks there were, events of Ray's processes, the use of the machine (which is a metric, too).
    "RAY_task_events_report_interval_ms": "0",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "3600",
    "REPORTER_UPDATE_INTERVAL_MS": "15000",
    # For other machines: resources that are free, copies of objects that are asked for again.
    "RAY_raylet_report_resources_period_milliseconds": "500",
    "RAY_object_manager_timer_freq_ms": "1000",
    # For whoever looks for a fault of Ray: how long its loops take.
    "RAY_io_context_monitor_probe_interval_ms": "60000",
    "RAY_io_context_event_loop_lag_collection_interval_ms": "60000",
    "RAY_DASHBOARD_AGGREGATOR_AGENT_CHECK_MAIN_THREAD_LIVENESS_INTERVAL_SECONDS": "10",
    # Whether memory runs out (four times a second), the store of objects is so full that Python's garbage should be collected, and
    # who is idle.
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_kill_idle_workers_interval_ms": "1000",
}
SERVE_DIRECTLY = {
    # They talk to each other straight over gRPC, in the event loop in which our own code runs as well, which takes less of them.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # How long a message may be: the gateway has limits for bodies of its own, and an echo with likelihoods is longer than a body.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}
"""Environment of Ray Serve's processes."""
OWN_RAY = {
    # Nobody but this process talks to it.
    "RAY_AUTH_MODE": "disabled",
    # Nobody takes its machine away: each training would start a process that looks out for that.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Its controller is in this process, whose log Ray's words go to.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    # A worker that waits for work looks up a hundred times a second: none is started before it is asked for.
    "RAY_prestart_worker_first_driver": "0",
    **PATIENT,
    **_SELDOM,
    **SERVE_DIRECTLY,
}
"""Environment of this process before Ray is imported, and of all of Ray's."""

log = logging.getLogger(__name__)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def is_own_ray() -> bool:
    """Whether this process has started the Ray that it is connected to."""
    return own_node() is not None


def own_node() -> Any:
    """The Ray that this process has started itself, or None."""
    worker = sys.modules.get("ray._private.worker")
    node = worker and worker._global_node  # private, because Ray does not say otherwise whose it is
    return node if node is not None and node.is_head() else None


def end_process(node: Any, code: int) -> None:
    """What Python and ray.shutdown do at the end of a process, without a word to Ray's core worker."""
    import psutil

    try:
        node.destroy_external_storage()  # objects for which the memory was too small
    except Exception:
        log.warning("what Ray has put on the disk could not be deleted", exc_info=True)
    # The kernel tells most of Ray's processes of our end, but its agents look for it a minute long.
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def spare_start() -> Iterator[None]:
    """For a `with` block, ray.init is patient, and starts no log monitor (it reads the workers' output for a driver that prints
    it), no autoscaler and no dashboard. Ray has no settings for that."""
    from ray._private.node import Node
    from ray._raylet import persist_port  # type: ignore[attr-defined]

    kept = {name: getattr(Node, name) for name in (*_NOT_STARTED, "start_raylet")}

    def start_raylet(node: Any, *arguments: Any) -> None:
        # Its agents, Python programs, have 15 s to write down the ports that they have found, else it aborts: it is told before.
        for name, port in zip(_AGENT_PORTS, _free_ports(len(_AGENT_PORTS)), strict=True):
            setattr(node._ray_params, name, port)
            persist_port(node._session_dir, node._node_id, name, port)
        kept["start_raylet"](node, *arguments)

    for name, instead in {**_NOT_STARTED, "start_raylet": start_raylet}.items():
        setattr(Node, name, instead)
    try:
        with patient_start():
            yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


def _nothing(node: Any) -> None:
    """Of that kind of process, none is started."""


def _say_no_dashboard(node: Any, **_: Any) -> None:
    """Ray's agent asks every second where the dashboard is, until it is told."""
    from ray._private import ray_constants

    node.get_gcs_client().internal_kv_put(
        ray_constants.DASHBOARD_ADDRESS.encode(), b"none", True, ray_constants.KV_NAMESPACE_DASHBOARD
    )


# As Ray's parameters and its files in the session's folder call them.
_AGENT_PORTS = (
    "metrics_agent_port",
    "metrics_export_port",
    "dashboard_agent_listen_port",
    "runtime_env_agent_port",
)
_NOT_STARTED = {
    "start_log_monitor": _nothing,
    "start_monitor": _nothing,
    "start_api_server": _say_no_dashboard,
}


@contextlib.contextmanager
def patient_start() -> Iterator[None]:
    """For a `with` block, a node of Ray that is started is waited for as long as START_TIMEOUT_S; Ray has no setting for its own
    30 s."""
    # Private, because that is where ray.init asks whether its node is up.
    from ray._private import services

    ask = services.get_node

    def wait(gcs_address: str, node_id: str) -> Any:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return ask(gcs_address, node_id)
            except RuntimeError:
                if time.monotonic() > deadline or _has_died("raylet"):
                    raise
                time.sleep(0.5)

    services.get_node = wait
    try:
        yield
    finally:
        services.get_node = ask


def _has_died(name: str) -> bool:
    """Whether a child of this process with this name has ended, and none is there that has not."""
    import psutil

    children = [child for child in psutil.Process().children() if child.name() == name]
    return bool(children) and all(child.status() == psutil.STATUS_ZOMBIE for child in children)
