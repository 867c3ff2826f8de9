"""What KubeRay's operator refuses or ignores though a schema allows it: each rule on an object that breaks it alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pipelines.manifests.kuberay import find_mistakes

POD = {"spec": {"containers": [{"name": "ray"}]}}
CLUSTER: dict[str, Any] = {
    "rayVersion": "2.60.0",
    "enableInTreeAutoscaling": True,
    "autoscalerOptions": {"version": "v2"},
    "authOptions": {"mode": "token"},
    "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": POD},
    "workerGroupSpecs": [{"groupName": "gpu", "minReplicas": 0, "maxReplicas": 4, "template": POD}],
}
JOB: dict[str, Any] = {"rayClusterSpec": CLUSTER, "entrypoint": "x", "shutdownAfterJobFinishes": True}
GOOD = {
    "RayCluster": CLUSTER,
    "RayJob": JOB,
    "RayCronJob": {"schedule": "0 2 * * *", "jobTemplate": JOB},
    "RayService": {
        "serveConfigV2": "",
        "rayClusterConfig": CLUSTER,
        "upgradeStrategy": {
            "type": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {"gatewayClassName": "g", "intervalSeconds": 5, "stepSizePercent": 10},
        },
    },
}


def with_change(kind: str, place: str, value: Any, name: str = "fine") -> dict[str, Any]:
    """A good object with one value changed, or taken out (None), at a dotted place of its spec."""
    manifest = {"kind": kind, "metadata": {"name": name}, "spec": copy.deepcopy(GOOD[kind])}
    *way, last = place.split(".")
    at: Any = manifest["spec"]
    for part in way:
        at = at[int(part) if part.isdigit() else part]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return manifest


@pytest.mark.parametrize("kind", list(GOOD))
def test_a_good_one_has_no_mistake(kind: str):
    assert find_mistakes({"kind": kind, "metadata": {"name": "fine"}, "spec": GOOD[kind]}) == []


@pytest.mark.parametrize(
    ("kind", "longest"), [("RayCluster", 53), ("RayJob", 47), ("RayService", 47), ("RayCronJob", 36)]
)
def test_names_leave_room_for_the_operators_suffix(kind: str, longest: int):
    for name, mistakes in (("a" * longest, 0), ("a" * (longest + 1), 1), ("1a", 1), ("a_b", 1), ("a-", 1)):
        manifest = {"kind": kind, "metadata": {"name": name}, "spec": GOOD[kind]}
        if len(name) > 5 and name.endswith("aaaaa"):
            manifest["metadata"] = {"generateName": name[:-5]}
        assert len(find_mistakes(manifest)) == mistakes, name


@pytest.mark.parametrize(
    ("kind", "place", "value", "mistake"),
    [
        ("RayCluster", "enableInTreeAutoscaling", False, "spec.autoscalerOptions is ignored"),
        ("RayCluster", "rayVersion", "2.51.3", "spec.authOptions: a token needs"),
        ("RayCluster", "workerGroupSpecs.0.minReplicas", 5, "spec.workerGroupSpecs[0]: 0 ≤ minReplicas"),
        ("RayCluster", "workerGroupSpecs.0.replicas", 5, "spec.workerGroupSpecs[0]: replicas"),
        ("RayCluster", "workerGroupSpecs.0.suspend", True, "spec.workerGroupSpecs[0]: a suspended group"),
        (
            "RayCluster",
            "headGroupSpec.rayStartParams.num-cpus",
            0,
            "spec.headGroupSpec.rayStartParams.num-cpus",
        ),
        ("RayCluster", "headGroupSpec.resources", {"CPU": "1"}, "spec.headGroupSpec: resources stand either"),
        (
            "RayCluster",
            "headGroupSpec.rayStartParams.labels",
            "a=b",
            "spec.headGroupSpec.rayStartParams.labels",
        ),
        ("RayCluster", "workerGroupSpecs.0.template", {"spec": {}}, "spec.workerGroupSpecs[0].template"),
        (
            "RayCluster",
            "headGroupSpec.template",
            {"spec": {"restartPolicy": "Always", "containers": [{}]}},
            "spec.headGroupSpec: with the autoscaler",
        ),
        (
            "RayCluster",
            "workerGroupSpecs",
            [{**CLUSTER["workerGroupSpecs"][0]}] * 2,
            "spec.workerGroupSpecs: two",
        ),
        ("RayJob", "entrypoint", None, "spec.entrypoint is missing"),
        ("RayJob", "rayClusterSpec", None, "spec: give one of"),
        ("RayJob", "clusterSelector", {"a": "b"}, "spec: give one of"),
        ("RayJob", "deletionStrategy", {"deletionRules": [1]}, "spec: deletionStrategy and"),
        ("RayJob", "activeDeadlineSeconds", 0, "spec.activeDeadlineSeconds must be positive"),
        ("RayJob", "submissionMode", "SidecarMode", ""),
        ("RayCronJob", "jobTemplate.entrypoint", "", "spec.jobTemplate.entrypoint is missing"),
        (
            "RayService",
            "upgradeStrategy.clusterUpgradeOptions.stepSizePercent",
            101,
            "spec.upgradeStrategy.clusterUpgradeOptions: 0 ≤ stepSizePercent",
        ),
        (
            "RayService",
            "upgradeStrategy.clusterUpgradeOptions.gatewayClassName",
            "",
            "spec.upgradeStrategy.clusterUpgradeOptions: intervalSeconds",
        ),
    ],
)
def test_each_rule_is_named(kind: str, place: str, value: Any, mistake: str):
    found = find_mistakes(with_change(kind, place, value))
    assert len(found) == bool(mistake), found
    assert not mistake or found[0].startswith(mistake)


@pytest.mark.parametrize(
    ("place", "value", "mistake"),
    [
        ("ttlSecondsAfterFinished", 60, "spec: ttlSecondsAfterFinished needs"),
        ("suspend", True, "spec: suspend needs"),
    ],
)
def test_what_needs_a_cluster_that_is_shut_down(place: str, value: Any, mistake: str):
    manifest = with_change("RayJob", place, value)
    assert find_mistakes(manifest) == []
    del manifest["spec"]["shutdownAfterJobFinishes"]
    (found,) = find_mistakes(manifest)
    assert found.startswith(mistake)


def test_what_kueue_refuses():
    manifest = with_change("RayJob", "backoffLimit", 1)
    manifest["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "q"}
    (found,) = find_mistakes(manifest)
    assert found.startswith(
        "spec.rayClusterSpec: the label kueue.x-k8s.io/queue-name and enableInTreeAutoscaling"
    )
    del manifest["spec"]["rayClusterSpec"]
    del manifest["spec"]["shutdownAfterJobFinishes"]
    manifest["spec"] |= {"clusterSelector": {"a": "b"}, "backoffLimit": 0}
    assert [line.split(" needs ")[1] for line in find_mistakes(manifest)] == [
        "shutdownAfterJobFinishes: true",
        "a cluster of the job's own, not clusterSelector",
    ]


def test_a_job_on_a_standing_cluster_is_not_started_again():
    manifest = with_change("RayJob", "clusterSelector", {"ray.io/cluster": "llada"})
    del manifest["spec"]["rayClusterSpec"]
    assert find_mistakes(manifest) == []
    manifest["spec"]["backoffLimit"] = 2
    (found,) = find_mistakes(manifest)
    assert found.startswith("spec: backoffLimit needs a cluster of the job's own")
    manifest["spec"] |= {"submissionMode": "SidecarMode", "backoffLimit": 0}
    (found,) = find_mistakes(manifest)
    assert found.startswith("spec: SidecarMode goes without clusterSelector")
