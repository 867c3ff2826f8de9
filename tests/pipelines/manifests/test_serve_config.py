"""Each mistake that Ray Serve takes in silence, or refuses only on the cluster, is one line that names its place."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pipelines.manifests.serve_config import find_environment_mistakes, find_mistakes

GOOD: dict[str, Any] = {
    "proxy_location": "EveryNode",
    "http_options": {"host": "0.0.0.0", "port": 8000},
    "logging_config": {"encoding": "JSON"},
    "applications": [
        {
            "name": "one",
            "route_prefix": "/",
            "import_path": "some.module:build",
            "args": {"any": {"thing": 1}},
            "runtime_env": {"env_vars": {"A": "1"}},
            "deployments": [
                {
                    "name": "D",
                    "max_ongoing_requests": 4,
                    "ray_actor_options": {"num_cpus": 1},
                    "autoscaling_config": {"min_replicas": 1, "max_replicas": 3},
                    "backpressure_config": {"status_code": 429},
                }
            ],
        }
    ],
}


def test_a_good_one_has_none():
    assert find_mistakes(GOOD) == []


@pytest.mark.parametrize(
    ("place", "value", "mistake"),
    [
        (["proxy_locatoin"], "HeadOnly", "unknown key proxy_locatoin; did you mean 'proxy_location'?"),
        (["http_options", "prot"], 1, "unknown key http_options.prot; did you mean 'port'?"),
        (["applications", 0, "arg"], {}, "unknown key applications[0].arg; did you mean 'args'?"),
        (
            ["applications", 0, "deployments", 0, "max_ongoing_request"],
            9,
            "unknown key applications[0].deployments[0].max_ongoing_request; did you mean 'max_ongoing_requests'?",
        ),
        (
            ["applications", 0, "deployments", 0, "autoscaling_config", "max_replica"],
            9,
            "unknown key applications[0].deployments[0].autoscaling_config.max_replica; did you mean 'max_replicas'?",
        ),
        (
            ["applications", 0, "deployments", 0, "ray_actor_options", "num_cpu"],
            9,
            "unknown key applications[0].deployments[0].ray_actor_options.num_cpu; did you mean 'num_cpus'?",
        ),
        (
            ["proxy_location"],
            "Nowhere",
            "proxy_location: Input should be 'Disabled', 'HeadOnly' or 'EveryNode'",
        ),
        (
            ["applications", 0, "deployments", 0, "autoscaling_config", "min_replicas"],
            5,
            "applications[0].deployments[0].autoscaling_config: max_replicas",
        ),
        (
            ["applications", 0, "deployments", 0, "num_replicas"],
            2,
            "applications[0].deployments[0]: Manually setting num_replicas is not allowed when autoscaling_config",
        ),
        (
            ["applications", 0, "runtime_env", "env_var"],
            {},
            "applications[0].runtime_env: unknown key 'env_var'; did you mean 'env_vars'?",
        ),
        (["applications"], "all", "applications: Input should be a valid list"),
    ],
)
def test_each_mistake_is_named(place: list[Any], value: Any, mistake: str):
    config = copy.deepcopy(GOOD)
    *way, last = place
    at: Any = config
    for part in way:
        at = at[part]
    at[last] = value
    found = find_mistakes(config)
    assert len(found) == 1
    assert found[0].startswith(mistake), found


@pytest.mark.parametrize(
    ("environment", "mistake"),
    [
        ({"env_vars": {"A": 1}}, "env: runtime_env['env_vars'] must be of type Dict[str, str]"),
        ({"pip": ["a"], "conda": "b"}, "env: The 'pip' field, 'uv' field, and 'conda' field"),
        (["a"], "env must hold 'key: value' lines"),
    ],
)
def test_an_environment_that_ray_would_refuse(environment: Any, mistake: str):
    (found,) = find_environment_mistakes(environment, "env")
    assert found.startswith(mistake)
