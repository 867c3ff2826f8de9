"""KubeRay's objects: what its operator refuses, or ignores, though their schemas allow it (KubeRay 1.7, validation.go).

The schemas are the cluster's: `kubectl apply --dry-run=server` says what does not fit them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

KINDS = ("RayCluster", "RayJob", "RayService", "RayCronJob")
# The operator adds a suffix of its own to the names of what it makes.
NAME_LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
# The label with which Kueue takes a job into its hands.
QUEUE = "kueue.x-k8s.io/queue-name"
# Ray's first release that knows a token.
TOKEN_SINCE = (2, 52, 0)


def find_mistakes(manifest: Mapping[str, Any]) -> list[str]:
    """What KubeRay's operator would find wrong in an object of KINDS, a line each."""
    kind, spec = manifest["kind"], manifest.get("spec") or {}
    metadata = manifest.get("metadata") or {}
    # Kubernetes adds five characters to a generateName.
    name = str(metadata.get("name") or f"{metadata.get('generateName', '')}abcde")
    mistakes = []
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        mistakes.append(f"metadata.name {name!r} must be letters, digits and hyphens, a letter first")
    if len(name) > NAME_LENGTHS[kind]:
        mistakes.append(f"metadata.name {name!r} is longer than {NAME_LENGTHS[kind]} characters")
    if kind == "RayCronJob":
        return [*mistakes, *_of_job(spec.get("jobTemplate") or {}, "spec.jobTemplate")]
    if kind == "RayJob":
        queued = QUEUE in (metadata.get("labels") or {})
        return [*mistakes, *_of_job(spec, "spec"), *(_of_queued_job(spec) if queued else [])]
    if kind == "RayService":
        return [*mistakes, *_of_service(spec)]
    return [*mistakes, *_of_cluster(spec, "spec")]


def jobs_of(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, job) of each RayJobSpec in an object of KINDS."""
    spec = manifest.get("spec") or {}
    if manifest["kind"] == "RayJob":
        yield "spec", spec
    if manifest["kind"] == "RayCronJob":
        yield "spec.jobTemplate", spec.get("jobTemplate") or {}


def _of_job(job: Mapping[str, Any], path: str) -> Iterator[str]:
    has_cluster, selector = "rayClusterSpec" in job, job.get("clusterSelector")
    if has_cluster == bool(selector):
        yield f"{path}: give one of rayClusterSpec and clusterSelector"
    if has_cluster:
        yield from _of_cluster(job["rayClusterSpec"], f"{path}.rayClusterSpec")
    rules, shuts_down = job.get("deletionStrategy"), job.get("shutdownAfterJobFinishes")
    if job.get("ttlSecondsAfterFinished") and not (shuts_down or rules):
        yield f"{path}: ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if job.get("suspend") and not shuts_down:
        yield f"{path}: suspend needs shutdownAfterJobFinishes: true"
    if rules and shuts_down:
        yield f"{path}: deletionStrategy and shutdownAfterJobFinishes exclude each other"
    mode = job.get("submissionMode", "K8sJobMode")
    if job.get("backoffLimit") and (selector or mode == "InteractiveMode"):
        yield f"{path}: backoffLimit needs a cluster of the job's own, which it starts again"
    if mode == "SidecarMode" and (selector or job.get("submitterPodTemplate") or job.get("submitterConfig")):
        yield f"{path}: SidecarMode goes without clusterSelector, submitterPodTemplate and submitterConfig"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if job.get(name, 1) <= 0:
            yield f"{path}.{name} must be positive"
    if mode != "InteractiveMode" and not job.get("entrypoint"):
        yield f"{path}.entrypoint is missing"


def _of_queued_job(job: Mapping[str, Any]) -> Iterator[str]:
    """What Kueue refuses: it must know what a job takes, and be able to suspend it."""
    if not job.get("shutdownAfterJobFinishes"):
        yield f"spec: the label {QUEUE} needs shutdownAfterJobFinishes: true"
    if job.get("clusterSelector"):
        yield f"spec: the label {QUEUE} needs a cluster of the job's own, not clusterSelector"
    if (job.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling"):
        yield f"spec.rayClusterSpec: the label {QUEUE} and enableInTreeAutoscaling exclude each other"


def _of_service(spec: Mapping[str, Any]) -> Iterator[str]:
    cluster = spec.get("rayClusterConfig") or {}
    yield from _of_cluster(cluster, "spec.rayClusterConfig")
    strategy = spec.get("upgradeStrategy") or {}
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        options = strategy.get("clusterUpgradeOptions") or {}
        step, surge = options.get("stepSizePercent", -1), options.get("maxSurgePercent", 100)
        path = "spec.upgradeStrategy.clusterUpgradeOptions"
        if not cluster.get("enableInTreeAutoscaling"):
            yield "spec.upgradeStrategy: an incremental upgrade needs enableInTreeAutoscaling"
        if not 0 <= step <= surge <= 100:
            yield f"{path}: 0 ≤ stepSizePercent ≤ maxSurgePercent ≤ 100 does not hold"
        if options.get("intervalSeconds", 0) <= 0 or not options.get("gatewayClassName"):
            yield f"{path}: intervalSeconds and gatewayClassName are needed"


def _of_cluster(cluster: Mapping[str, Any], path: str) -> Iterator[str]:
    autoscales = bool(cluster.get("enableInTreeAutoscaling"))
    head, workers = cluster.get("headGroupSpec") or {}, cluster.get("workerGroupSpecs") or []
    names = [group.get("groupName") for group in workers]
    if len(set(names)) < len(names):
        yield f"{path}.workerGroupSpecs: two groups have one name"
    for group, place in [
        (head, f"{path}.headGroupSpec"),
        *((group, f"{path}.workerGroupSpecs[{number}]") for number, group in enumerate(workers)),
    ]:
        yield from _of_group(group, place, autoscales=autoscales)
    for number, group in enumerate(workers):
        place, low, high = (
            f"{path}.workerGroupSpecs[{number}]",
            group.get("minReplicas", 0),
            group.get("maxReplicas"),
        )
        if high is not None and not 0 <= low <= high:
            yield f"{place}: 0 ≤ minReplicas ≤ maxReplicas does not hold"
        elif high is not None and not low <= group.get("replicas", low) <= high:
            yield f"{place}: replicas is not between minReplicas and maxReplicas"
        if group.get("suspend") and autoscales:
            yield f"{place}: a suspended group and enableInTreeAutoscaling exclude each other"
    if cluster.get("autoscalerOptions") and not autoscales:
        yield f"{path}.autoscalerOptions is ignored without enableInTreeAutoscaling: true"
    if (cluster.get("authOptions") or {}).get("mode") == "token":
        version = tuple(int(part) for part in re.findall(r"\d+", str(cluster.get("rayVersion", "")))[:3])
        if version < TOKEN_SINCE:
            yield f"{path}.authOptions: a token needs rayVersion 2.52.0 or newer"


def _of_group(group: Mapping[str, Any], path: str, *, autoscales: bool) -> Iterator[str]:
    start = group.get("rayStartParams") or {}
    if group.get("resources") and set(start) & {"num-cpus", "num-gpus", "memory", "resources"}:
        yield f"{path}: resources stand either in `resources` or in rayStartParams"
    if "labels" in start:
        yield f"{path}.rayStartParams.labels: labels stand in `labels`"
    for name, value in start.items():
        if not isinstance(value, str):
            yield f"{path}.rayStartParams.{name} must be a text: write {str(value)!r}"
    pod = (group.get("template") or {}).get("spec") or {}
    if autoscales and pod.get("restartPolicy", "Never") != "Never":
        yield f"{path}: with the autoscaler, restartPolicy must be Never or unset"
    if not pod.get("containers"):
        yield f"{path}.template.spec.containers is empty"
