"""Every YAML file of infra/ against its schema, strictly and without a cluster, and what no schema says.

Kubernetes' own kinds by the schemas of `kubernetes-validate`; KubeRay's, Kueue's and the Prometheus operator's by the fields
that custom_resources.yaml beside this file lists.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import referencing
import yaml

from llada.settings import parse_yaml
from pipelines.check import check_document
from pipelines.manifests.kuberay import jobs_of
from pipelines.stage.cluster import load_cluster
from pipelines.stage.own_ray import SERVE_DIRECTLY

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "kubernetes"
# The release that infra/terraform asks for: newer ones only add fields.
KUBERNETES = "1.34"
CORE = "https://kubernetes.io/api/_definitions.json"
RESOURCES = yaml.safe_load(Path(__file__).with_name("custom_resources.yaml").read_text())
README = (ROOT / "infra/README.md").read_text()
# Made by commands, since what is in them stands in no file.
SECRETS = set(re.findall(r"--namespace llada create secret generic ([\w-]+)", README))
# Applied by themselves.
ALONE = {
    "pretrain.yaml",
    "service.yaml",
    "service_small.yaml",
    "nightly/rayjob.yaml",
    "nightly/raycronjob.yaml",
}


@functools.cache
def manifests() -> tuple[tuple[str, dict[str, Any]], ...]:
    """(file, document) of all Kubernetes manifests in infra/."""
    return tuple(
        (str(path.relative_to(ROOT / "infra")), document)
        for path in sorted((ROOT / "infra").rglob("*.yaml"))
        for document in parse_yaml(path.read_text(), str(path))
        if "kind" in document
    )


MANIFESTS = [
    pytest.param(manifest, id=f"{file}:{manifest['kind']}")
    for file, manifest in manifests()
    if manifest["kind"] != "Kustomization"
]


# --- Schemas ----------------------------------------------------------------------------------------------------------


def find_mistakes(manifest: dict[str, Any]) -> list[str]:
    """What does not fit the manifest's schema, a line each."""
    name = f"{manifest.get('apiVersion')} {manifest.get('kind')}"
    if name in RESOURCES:
        errors = custom_validator(name).iter_errors(manifest)
        return [f"{error.json_path}: {error.message}" for error in errors]
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.SchemaNotFoundError as error:
        return [error.message]
    except jsonschema.ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    return []


@functools.cache
def custom_validator(name: str) -> jsonschema.Draft202012Validator:
    api_version, kind = name.split()
    manifest = {
        "apiVersion!": api_version,
        "kind!": kind,
        "metadata!": "core io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
        "spec!": RESOURCES[name],
    }
    types = {name: schema_of(fields) for name, fields in RESOURCES.items() if " " not in name}
    return jsonschema.Draft202012Validator({**schema_of(manifest), "$defs": types}, registry=core())


@functools.cache
def core() -> referencing.Registry:
    """Kubernetes' own types, without fields that they do not have."""
    folder = importlib.resources.files(kubernetes_validate) / "kubernetes-json-schema"
    text = (folder / f"v{KUBERNETES}.0-local-strict" / "_definitions.json").read_text()
    return referencing.Resource.from_contents(json.loads(text)) @ referencing.Registry()


def schema_of(notation: Any) -> dict[str, Any]:
    """The JSON schema of the notation at the top of custom_resources.yaml."""
    if isinstance(notation, dict):
        return {
            "type": "object",
            "properties": {name.rstrip("!"): schema_of(kind) for name, kind in notation.items()},
            "required": [name[:-1] for name in notation if name.endswith("!")],
            "additionalProperties": False,
        }
    if isinstance(notation, list):
        return {"type": "array", "items": schema_of(notation[0])}
    if notation in ("string", "integer", "number", "boolean"):
        return {"type": notation}
    if notation.startswith("map of "):
        return {"type": "object", "additionalProperties": schema_of(notation.removeprefix("map of "))}
    if notation.startswith("core "):
        return {"$ref": f"{CORE}#/$defs/{notation.removeprefix('core ')}"}
    if notation in RESOURCES:
        return {"$ref": f"#/$defs/{notation}"}
    return {"enum": notation.split(" | ")}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_fits_its_schema_and_the_operators_rules(manifest: dict[str, Any]):
    assert find_mistakes(manifest) == []
    assert not check_document(manifest)[1]


@pytest.mark.parametrize(
    ("file", "kind", "place", "value"),
    [
        ("kubernetes/cluster.yaml", "RayCluster", "spec.headGroupSpec.rayStartParam", {}),
        ("kubernetes/cluster.yaml", "RayCluster", "spec.authOptions.mode", "tokn"),
        ("kubernetes/cluster.yaml", "RayCluster", "spec.workerGroupSpecs.0.minReplicas", "1"),
        ("kubernetes/cluster.yaml", "RayCluster", "spec.workerGroupSpecs.0.template.spec.nodeSelectr", {}),
        (
            "kubernetes/cluster.yaml",
            "RayCluster",
            "spec.workerGroupSpecs.0.template.spec.containers.0.resources.limit",
            {},
        ),
        ("kubernetes/pretrain.yaml", "RayJob", "spec.rayClusterSpec.headGroupSpec.template.specc", {}),
        ("kubernetes/service.yaml", "RayService", "spec.serveConfig", ""),
        ("kubernetes/queues.yaml", "ClusterQueue", "spec.resourceGroups.0.flavors.0.quota", 1),
        ("kubernetes/nightly/cronjob.yaml", "CronJob", "spec.concurrencyPolic", "Forbid"),
        ("kubernetes/nightly/raycronjob.yaml", "RayCronJob", "spec.jobTemplate.entrypont", ""),
    ],
)
def test_a_misspelt_field_is_found(file: str, kind: str, place: str, value: Any):
    (manifest,) = (
        copy.deepcopy(found) for name, found in manifests() if (name, found["kind"]) == (file, kind)
    )
    assert find_mistakes(manifest) == []
    *way, last = place.split(".")
    at: Any = manifest
    for part in way:
        at = at[int(part) if part.isdigit() else part]
    at[last] = value
    assert len(find_mistakes(manifest)) == 1


VALUES = yaml.safe_load(Path(__file__).with_name("helm_values.yaml").read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "infra/helm").iterdir()), ids=lambda path: path.stem)
def test_helm_values_are_those_that_the_chart_has(path: Path):
    (values,) = parse_yaml(path.read_text(), str(path))
    validator = jsonschema.Draft202012Validator(schema_of(VALUES[path.stem]), registry=core())
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(values)] == []


# --- What no schema says ----------------------------------------------------------------------------------------------


def pods_in(value: Any) -> Iterator[dict[str, Any]]:
    """The pod specifications at or below a value."""
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield value
        for below in value.values():
            yield from pods_in(below)
    elif isinstance(value, list):
        for below in value:
            yield from pods_in(below)


def test_every_pod_is_restricted_and_says_what_it_needs():
    """As the namespace enforces it (Kubernetes' Pod Security Standards), and a root file system that nobody can write."""
    found = [(file, pod) for file, manifest in manifests() for pod in pods_in(manifest)]
    assert len(found) > 10
    for file, pod in found:
        assert pod["securityContext"]["runAsNonRoot"], file
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, file
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), file
        assert all("hostPath" not in volume for volume in pod.get("volumes", [])), file
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, file
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), file
            assert "memory" in container["resources"]["limits"], file


def test_what_a_manifest_names_is_there():
    made: dict[str, set[str]] = {}
    for _, manifest in manifests():
        made.setdefault(manifest["kind"], set()).add(manifest.get("metadata", {}).get("name", ""))
    generated = {
        one["name"]
        for _, manifest in manifests()
        if manifest["kind"] == "Kustomization"
        for one in manifest.get("configMapGenerator", [])
    }
    for file, manifest in manifests():
        queue = manifest.get("metadata", {}).get("labels", {}).get("kueue.x-k8s.io/queue-name")
        assert queue is None or queue in made["LocalQueue"], file
        for pod in pods_in(manifest):
            assert pod.get("priorityClassName") in made["PriorityClass"], file
            assert pod.get("serviceAccountName") in {None, *made["ServiceAccount"]}, file
            volumes = {volume["name"] for volume in pod.get("volumes", [])}
            for container in pod["containers"]:
                mounted = {mount["name"] for mount in container["volumeMounts"]}
                assert mounted <= volumes or manifest["kind"] == "StatefulSet", file
        text = json.dumps(manifest)
        maps = re.findall(r'"config[mM]ap(?:Ref)?": {"name": "([\w-]+)"', text)
        assert set(maps) <= made["ConfigMap"] | generated, file
        secrets = re.findall(r'"secret(?:Key)?Ref": {"name": "([\w-]+)"', text)
        assert set(secrets) <= SECRETS, file


def test_an_endpoints_pods_talk_to_each_other_as_on_a_ray_of_our_own():
    """All of them, or a proxy and a replica would not understand each other; and as the fault tests have it."""
    made = {
        manifest["metadata"]["name"]: manifest
        for _, manifest in manifests()
        if manifest["kind"] == "ConfigMap"
    }
    assert made["llada-serve"]["data"] == SERVE_DIRECTLY
    services = [manifest for _, manifest in manifests() if manifest["kind"] == "RayService"]
    pods = [pod for service in services for pod in pods_in(service)]
    assert len(pods) == 4
    for pod in pods:
        (container,) = pod["containers"]
        assert {"configMapRef": {"name": "llada-serve"}} in container["envFrom"]


def test_entrypoints_name_cluster_files_that_are_in_the_image():
    files = [
        re.search(r"--cluster (\S+)", job["entrypoint"])[1]
        for _, manifest in manifests()
        if manifest["kind"] in ("RayJob", "RayCronJob")
        for _, job in jobs_of(manifest)
    ]
    assert len(files) >= 3
    assert all(load_cluster(ROOT / file).address == "auto" for file in files)


@pytest.mark.parametrize("file", ["pretrain.yaml", "nightly/rayjob.yaml"])
def test_a_jobs_machines_are_what_its_cluster_file_asks_for(file: str):
    """The fewest workers fit, no GPU is left over, and the shell that reads the command knows its variables."""
    (manifest,) = parse_yaml((FOLDER / file).read_text(), file)
    job = manifest["spec"]
    cluster = load_cluster(ROOT / re.search(r"--cluster (\S+)", job["entrypoint"])[1])
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    requests = container["resources"]["requests"]
    machines, cpus = group["replicas"], float(requests["cpu"])
    gpus = int(requests.get("nvidia.com/gpu", 0))
    if "pretrain" in job["entrypoint"]:
        workers = gpus // cluster.gpus_per_worker
        assert workers * cluster.cpus_per_worker <= cpus
        assert cluster.min_workers <= machines * workers <= cluster.max_workers
    else:
        memory = int(requests["memory"].removesuffix("Gi")) << 30
        each = cluster.memory_bytes_per_data_worker or 0
        assert cpus // cluster.cpus_per_data_worker * each <= 0.7 * memory  # the rest is Ray's object store
    (submitter,) = job["submitterPodTemplate"]["spec"]["containers"]
    assert set(re.findall(r"\$(\w+)", job["entrypoint"])) == {"LLADA_BUCKET"}
    assert submitter["envFrom"] == [{"configMapRef": {"name": "llada"}}]


def test_both_clocks_start_the_same_night():
    of_cron, of_ray = (
        yaml.safe_load((FOLDER / "nightly" / name).read_text()) for name in ("rayjob.yaml", "raycronjob.yaml")
    )
    (cronjob,) = parse_yaml((FOLDER / "nightly/cronjob.yaml").read_text(), "cronjob")
    assert cronjob["spec"]["concurrencyPolicy"] == "Forbid"  # the schema takes any word
    assert of_cron["spec"] == of_ray["spec"]["jobTemplate"]
    assert of_ray["spec"]["schedule"] == cronjob["spec"]["schedule"]


def test_kustomizations_name_every_file_once():
    named = []
    for path in sorted((ROOT / "infra").rglob("kustomization.yaml")):
        (kustomization,) = parse_yaml(path.read_text(), str(path))
        assert kustomization.keys() <= {
            "apiVersion",
            "kind",
            "resources",
            "configMapGenerator",
            "generatorOptions",
        }
        assert (kustomization["apiVersion"], kustomization["kind"]) == (
            "kustomize.config.k8s.io/v1beta1",
            "Kustomization",
        )
        files = list(kustomization.get("resources", []))
        for generated in kustomization.get("configMapGenerator", []):
            assert generated.keys() <= {"name", "namespace", "files", "options"}
            files += generated["files"]
        named += [(path.parent / file).resolve() for file in files]
    assert all(path.is_file() for path in named)
    applied = {FOLDER / name for name in ALONE if name != "nightly/rayjob.yaml"} | set(named)
    assert {path for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml"} <= applied
    assert len(set(named)) == len(named)


def test_the_readme_puts_a_bucket_and_images_in_their_place(tmp_path: Path):
    """By its own function, in all that is applied; and secrets of the charts are those that it makes."""
    (function,) = re.findall(r"^ *(place\(\) .*)$", README, re.MULTILINE)
    for path in [*FOLDER.glob("*.yaml"), *(FOLDER / "nightly").glob("*job.yaml")]:
        done = subprocess.run(
            ["bash", "-ec", f'{function}\nplace "$1"', "place", path],
            env={"BUCKET": "mine", "REGISTRY": "registry.example", "AWS_REGION": "eu-west-1", "PATH": os.environ["PATH"]},
            capture_output=True, text=True, timeout=240, check=True,
        )  # fmt: skip
        assert "llada-example" not in done.stdout
        assert not re.search(r"image: llada:", done.stdout)
        assert "us-east-1" not in done.stdout
        assert list(yaml.safe_load_all(done.stdout))
    of_charts = (ROOT / "infra/helm").glob("*.yaml")
    asked = {
        name
        for path in of_charts
        for found in re.findall(
            r"existing\w*Secret: (?:{name: )?([\w-]+)|secrets: \[([\w-]+)\]", path.read_text()
        )
        for name in found
        if name
    }
    made = set(re.findall(r"--namespace (?:mlflow|monitoring) create secret generic ([\w-]+)", README))
    assert asked == made


def test_the_readmes_commands_are_bash_and_name_what_is_there():
    blocks = re.findall(r"^( *)```bash\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 9
    for indent, block in blocks:
        text = "\n".join(line.removeprefix(indent) for line in block.splitlines())
        subprocess.run(["bash", "-n", "-c", text], check=True, timeout=240)
    for name in re.findall(r"\binfra/[\w./-]+[\w]", README):
        assert (ROOT / name).exists(), name
    for chart, version in re.findall(r"--install [\w-]+ \S*?([\w-]+) --version (\S+)", README):
        values = ROOT / "infra" / "helm" / f"{chart}.yaml"
        assert not values.exists() or f"--version {version}" in values.read_text(), chart


# --- A night ----------------------------------------------------------------------------------------------------------

KUBECTL = """#!/bin/sh
echo "$@" >> "$FAKE/calls"
case "$*" in
  "get rayjobs"*) cat "$FAKE/unfinished" ;;
  "create"*) echo prepare-abcde ;;
  *status.message*) echo "out of memory" ;;
  "get rayjob"*) head -n 1 "$FAKE/statuses"; sed -i 1d "$FAKE/statuses" ;;
esac
"""


@pytest.mark.parametrize(
    ("unfinished", "statuses", "code", "said"),
    [
        (
            "",
            [" Initializing", "RUNNING Running", "SUCCEEDED Complete"],
            0,
            "prepare-abcde: SUCCEEDED Complete",
        ),
        ("", ["RUNNING Running", "FAILED Failed"], 3, "prepare-abcde: FAILED Failed: out of memory"),
        ("", ["FAILED Complete"], 3, "prepare-abcde: FAILED Complete: out of memory"),
        ("prepare-older\n", ["SUCCEEDED Complete"], 0, "prepare-older: SUCCEEDED Complete"),
    ],
)
def test_a_night_waits_for_its_job_and_has_its_exit_code(
    tmp_path: Path, unfinished: str, statuses: list[str], code: int, said: str
):
    """With a kubectl that answers what a cluster would."""
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    (tmp_path / "unfinished").write_text(unfinished)
    (tmp_path / "statuses").write_text("\n".join(statuses) + "\n")
    done = subprocess.run(
        ["sh", FOLDER / "nightly" / "run.sh"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "POLL_S": "0"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, (done.stdout + done.stderr).splitlines()[-1]) == (code, said)
    calls = (tmp_path / "calls").read_text()
    assert ("create " in calls) == (not unfinished)
    (cronjob,) = parse_yaml((FOLDER / "nightly/cronjob.yaml").read_text(), "cronjob")
    rules = cronjob["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [3]


def test_a_pod_that_goes_drains_its_node():
    """The command of preStop is one that this Ray has."""
    from ray.scripts.scripts import drain_node

    options = {name for parameter in drain_node.params for name in parameter.opts}
    commands = {
        pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
        for _, manifest in manifests()
        for pod in pods_in(manifest)
        if pod["containers"][0]["name"] == "ray-worker"
    }
    (command,) = commands
    words = shlex.split(command.split(";")[0])
    assert words[:2] == ["ray", drain_node.name]
    assert {word for word in words if word.startswith("--")} <= options
