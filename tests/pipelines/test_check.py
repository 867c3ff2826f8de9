"""`llada check`: the files of this repository are good ones, and what is wrong in a file is said with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.check import check_file

ROOT = Path(__file__).resolve().parents[2]
JOB = """
apiVersion: ray.io/v1
kind: RayJob
metadata: {name: job}
spec:
  clusterSelector: {ray.io/cluster: llada}
  entrypoint: ENTRYPOINT
"""


@pytest.mark.parametrize("file", sorted((ROOT / "ray_configs").rglob("*.yaml")), ids=lambda file: file.name)
def test_the_shipped_files_are_good(file: Path):
    assert [mistakes for _, mistakes in check_file(str(file)) if mistakes] == []


@pytest.mark.parametrize(
    ("text", "what", "mistake"),
    [
        (
            "applications: [{import_path: 'pipelines.serve:build_app', args: {model: m, max_replica: 2}}]",
            "Serve configuration",
            "applications[0].args: unknown setting max_replica; did you mean 'max_replicas'?",
        ),
        (
            "applications: [{import_path: 'pipelines.serve:build_app', args: {model: m}, "
            "deployments: [{name: Denoisr}]}]",
            "Serve configuration",
            "applications[0].deployments[0]: no deployment 'Denoisr'; known: Gateway, Denoiser",
        ),
        (
            "applications: [{import_path: 'pipelines.serve:build_app', args: {model: m}, "
            "deployments: [{name: Denoiser, max_queued_requests: 3}]}]",
            "Serve configuration",
            "applications[0].deployments[0].max_queued_requests would win over `args`",
        ),
        ("num_workrs: 1", "cluster file", "unknown setting num_workrs; did you mean 'num_workers'?"),
        ("runtime_env: {pipp: [a]}", "cluster file", "runtime_env: unknown key 'pipp'; did you mean 'pip'?"),
        (
            "{cluster_name: c, provider: {type: aws}, max_worker: 1}",
            "Ray's cluster launcher",
            "$: Additional properties are not allowed ('max_worker' was unexpected)",
        ),
        (
            "{kind: RayService, metadata: {name: s}, spec: {serveConfigV2: 'applications: [{import_pth: a:b}]', "
            "rayClusterConfig: {headGroupSpec: {template: {spec: {containers: [{}]}}}}}}",
            "RayService s",
            "spec.serveConfigV2: unknown key applications[0].import_pth; did you mean 'import_path'?",
        ),
        (
            "{kind: RayService, metadata: {name: s}, spec: {serveConfigV2: 'a: [', "
            "rayClusterConfig: {headGroupSpec: {template: {spec: {containers: [{}]}}}}}}",
            "RayService s",
            "serveConfigV2 is not YAML",
        ),
        (
            JOB.replace("ENTRYPOINT", "python -m pipelines.prepare tiny --input a --output b --packig x"),
            "RayJob job",
            "spec.entrypoint: does not parse: Unrecognized options",
        ),
        (
            JOB.replace("ENTRYPOINT", "llada pretrain tiny --data d"),
            "RayJob job",
            "spec.entrypoint: does not parse: Required options",
        ),
        (
            JOB.replace("ENTRYPOINT", "llada pretrain small --data d --output o"),
            "RayJob job",
            "spec.entrypoint: there is no preset 'small'",
        ),
        (
            JOB.replace("ENTRYPOINT", "llada pretran tiny"),
            "RayJob job",
            "spec.entrypoint: names no stage that a job can run: 'pretran'",
        ),
        (
            JOB.replace("ENTRYPOINT", "bash run.sh"),
            "RayJob job",
            "spec.entrypoint: is neither `llada <stage> …` nor `python -m pipelines.<stage> …`",
        ),
        (
            JOB.replace("ENTRYPOINT", "llada evaluate --model m --output o")
            + "  runtimeEnvYAML: 'env_var: {}'\n",
            "RayJob job",
            "spec.runtimeEnvYAML: unknown key 'env_var'; did you mean 'env_vars'?",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, llada, text: str, what: str, mistake: str):
    file = tmp_path / "file.yaml"
    file.write_text(text)
    code, _, said = llada("check", str(file))
    assert code == 1
    first, last = said.splitlines()
    assert first.startswith(f"{file}: {what}: {mistake}")
    assert last == "llada check: 1 mistake found"


def test_several_documents_and_what_is_none_of_ours(tmp_path: Path, llada):
    file = tmp_path / "file.yaml"
    file.write_text(
        "num_workers: 2\n---\n{apiVersion: v1, kind: Secret}\n---\n" + JOB.replace("ENTRYPOINT", "x")
    )
    code, out, said = llada("check", str(file))
    assert code == 1
    assert out.splitlines() == [
        f"{file}: cluster file: ok",
        f"{file}: Secret: left to kubectl apply --dry-run=server",
    ]
    assert len(said.splitlines()) == 2
    for text, mistake in (
        ("", "is empty"),
        ("- a", "must hold"),
        ("a: 1\na: 2", "given twice"),
        ("a: [", "no.. YAML"),
    ):
        file.write_text(text)
        code, _, said = llada("check", str(file))
        assert (code, len(said.splitlines())) == (1, 1)
        assert mistake.split("..")[-1].strip() in said
    assert llada("check")[0] == 1
