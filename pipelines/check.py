"""The command `check`: what is wrong in the files that a cluster is given, before one sees them.

    Serve configurations    every key and value, and the `args` of our application     ray_configs/serve.yaml
    KubeRay's objects       what the operator refuses or ignores, the texts of YAML in them, and that entrypoints parse
    Ray's cluster launcher  Ray's own schema                                            `ray up`
    cluster files           as `--cluster` reads them                                   ray_configs/*.yaml

What a file is, its keys say. Other Kubernetes objects are left to `kubectl apply --dry-run=server`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from llada.errors import UserError
from llada.settings import from_dict, load_text, parse_yaml, require
from pipelines.manifests import kuberay, serve_config
from pipelines.serve import build_app, build_deployments
from pipelines.serving.args import parse_args
from pipelines.stage.cluster import ClusterConfig
from pipelines.stage.command import parse, parse_entrypoint, run_command

OUR_APPLICATION = f"{build_app.__module__}:{build_app.__name__}"


@dataclass(frozen=True)
class CheckArgs:
    """Say what is wrong in files for a cluster; exit code 1 if anything is."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """YAML files at any fsspec URL, of one or several documents."""


def main(argv: Sequence[str]) -> None:
    """`llada check FILE…`"""
    args = parse(CheckArgs, argv, "check")
    require(bool(args.files), "name the files: llada check FILE…")
    wrong = 0
    for file in args.files:
        for what, mistakes in check_file(file):
            if mistakes is None:
                print(f"{file}: {what}: left to kubectl apply --dry-run=server")
                continue
            for mistake in mistakes:
                print(f"{file}: {what}: {mistake}", file=sys.stderr)
            wrong += len(mistakes)
            if not mistakes:
                print(f"{file}: {what}: ok")
    if wrong:
        raise UserError(f"{wrong} mistake{'s' * (wrong > 1)} found")


def check_file(url: str) -> Iterator[tuple[str, list[str] | None]]:
    """(what it is, the mistakes in it) of each document. Raises UserError when the file cannot be read or is no YAML."""
    documents = parse_yaml(load_text(url, "file"), url)
    require(bool(documents), f"{url} is empty")
    for document in documents:
        require(isinstance(document, dict), f"{url} must hold 'key: value' lines")
        yield check_document(document)


def check_document(document: Mapping[str, Any]) -> tuple[str, list[str] | None]:
    """(what it is, the mistakes in it, or None for what is not looked at)."""
    if document.get("kind") in kuberay.KINDS:
        metadata = document.get("metadata") or {}
        name = metadata.get("name") or metadata.get("generateName")
        return f"{document['kind']} {name}", check_kuberay(document)
    if "apiVersion" in document and "kind" in document:
        return str(document["kind"]), None
    if "applications" in document:
        return "Serve configuration", check_serve(document)
    if "provider" in document or "cluster_name" in document:
        return "Ray's cluster launcher", check_launcher(document)
    try:
        cluster = from_dict(ClusterConfig, dict(document))
    except UserError as error:
        return "cluster file", [str(error)]
    return "cluster file", serve_config.find_environment_mistakes(cluster.runtime_env, "runtime_env")


def check_serve(config: Mapping[str, Any]) -> list[str]:
    """What is wrong in a Serve configuration, also in the arguments of our application."""
    if mistakes := serve_config.find_mistakes(config):
        return mistakes
    for number, application in enumerate(config["applications"]):
        if application["import_path"] == OUR_APPLICATION:
            mistakes += _check_ours(application, f"applications[{number}]")
    return mistakes


def _check_ours(application: Mapping[str, Any], path: str) -> list[str]:
    """`deployments` win over `args`: a limit of ours stands in `args` alone, or it would be stated twice."""
    try:
        built = {one.name: one for one in build_deployments(parse_args(application.get("args") or {}))}
    except UserError as error:
        return [f"{path}.args: {error}"]
    mistakes = []
    for number, deployment in enumerate(application.get("deployments") or []):
        place = f"{path}.deployments[{number}]"
        if deployment["name"] not in built:
            mistakes.append(f"{place}: no deployment {deployment['name']!r}; known: {', '.join(built)}")
            continue
        ours = built[deployment["name"]]._deployment_config.user_configured_option_names
        for name in sorted({*ours, "ray_actor_options"} & (deployment.keys() - {"name"})):
            mistakes.append(f"{place}.{name} would win over `args`, where it belongs (llada serve --help)")
    return mistakes


def check_kuberay(manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong in an object of KubeRay's, in its entrypoint, and in the YAML that stands in its texts."""
    mistakes = kuberay.find_mistakes(manifest)
    if manifest["kind"] == "RayService":
        for values in _nested(manifest.get("spec") or {}, "serveConfigV2", mistakes):
            mistakes += [f"spec.serveConfigV2: {mistake}" for mistake in check_serve(values)]
    for path, job in kuberay.jobs_of(manifest):
        for environment in _nested(job, "runtimeEnvYAML", mistakes):
            mistakes += serve_config.find_environment_mistakes(environment, f"{path}.runtimeEnvYAML")
        if entrypoint := job.get("entrypoint"):
            try:
                parse_entrypoint(entrypoint)
            except UserError as error:
                mistakes.append(f"{path}.entrypoint: {error}")
    return mistakes


def _nested(spec: Mapping[str, Any], key: str, mistakes: list[str]) -> list[Any]:
    """The documents of YAML in the text `spec[key]`; what is wrong with it is added to `mistakes`."""
    if key not in spec:
        return []
    try:
        return parse_yaml(spec[key], key)
    except (UserError, AttributeError) as error:
        mistakes.append(str(error) if isinstance(error, UserError) else f"{key} must be a text (|)")
        return []


def check_launcher(config: Mapping[str, Any]) -> list[str]:
    """What Ray's schema of `ray up` finds wrong."""
    import jsonschema
    import ray.autoscaler

    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    found = jsonschema.Draft7Validator(schema).iter_errors(config)
    return [f"{error.json_path.removeprefix('$.')}: {error.message}" for error in found]


if __name__ == "__main__":
    run_command("check")
