"""A Ray Serve configuration (`serve deploy FILE`, serveConfigV2 of a RayService), read strictly.

Ray's own schema drops the keys that it does not know: a misspelt `max_ongoing_request` is no limit. Here every key of every
level must be one of Ray's, and the values must be what Ray takes.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from llada.errors import hint


def find_mistakes(values: Any) -> list[str]:
    """What is wrong in a Serve configuration, a line each; nothing in a good one.

    What an application's builder makes of its `args` is not looked at.
    """
    from ray.serve.schema import ServeDeploySchema

    return (
        list(_unknown_keys(ServeDeploySchema, values, ""))
        or list(_wrong_values(ServeDeploySchema, values))
        or list(_wrong_in_applications(values))
    )


def find_environment_mistakes(environment: Any, path: str) -> list[str]:
    """What is wrong in a runtime environment that stands at `path`."""
    from ray.runtime_env import RuntimeEnv

    if not isinstance(environment, Mapping):
        return [f"{path} must hold 'key: value' lines"]
    known = sorted(name for name in RuntimeEnv.known_fields if not name.startswith("_"))
    mistakes = [f"{path}: unknown key {key!r}; {hint(key, known)}" for key in environment if key not in known]
    if not mistakes:
        try:
            RuntimeEnv(**environment)
        except (TypeError, ValueError) as error:
            mistakes.append(f"{path}: {str(error).splitlines()[0]}")
    return mistakes


def _wrong_in_applications(values: Mapping[str, Any]) -> Iterator[str]:
    """What Ray's schema of the whole leaves as plain mappings."""
    from ray.serve.config import AutoscalingConfig

    for number, application in enumerate(values["applications"]):
        path = f"applications[{number}]"
        if environment := application.get("runtime_env"):
            yield from find_environment_mistakes(environment, f"{path}.runtime_env")
        for index, deployment in enumerate(application.get("deployments") or []):
            of_deployment = f"{path}.deployments[{index}]"
            options = deployment.get("ray_actor_options") or {}
            if environment := options.get("runtime_env"):
                yield from find_environment_mistakes(
                    environment, f"{of_deployment}.ray_actor_options.runtime_env"
                )
            if scaling := deployment.get("autoscaling_config"):
                yield from _wrong_values(AutoscalingConfig, scaling, f"{of_deployment}.autoscaling_config")


def _wrong_values(kind: type[BaseModel], values: Any, path: str = "") -> Iterator[str]:
    try:
        kind.model_validate(values)
    except ValidationError as error:
        for found in error.errors():
            place = path
            for part in found["loc"]:
                place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
            yield f"{place}: {found['msg'].removeprefix('Value error, ')}"


def _unknown_keys(kind: Any, value: Any, path: str) -> Iterator[str]:
    """Keys of `value` and below that the annotation `kind` has no field for."""
    options = [kind]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = list(typing.get_args(kind))
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel) and isinstance(value, Mapping):
            fields = option.model_fields
            for key, below in value.items():
                place = f"{path}.{key}" if path else str(key)
                if key in fields:
                    yield from _unknown_keys(fields[key].annotation, below, place)
                else:
                    yield f"unknown key {place}; {hint(key, fields)}"
        elif typing.get_origin(option) is list and isinstance(value, list):
            for number, below in enumerate(value):
                yield from _unknown_keys(typing.get_args(option)[0], below, f"{path}[{number}]")
