"""The settings of an endpoint, read strictly; and the folders that its models are in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest

from llada.errors import UserError
from llada.sampling.config import SamplingConfig
from pipelines.serving.args import ServeArgs, parse_args, with_folders


def test_sampling_settings_keep_the_endpoints_defaults() -> None:
    args = parse_args({"model": "m", "sampling": {"threshold": 0.9}})
    assert args.sampling == SamplingConfig(gen_length=128, steps=None, block_length=32, threshold=0.9)
    assert parse_args({"model": "m"}) == ServeArgs("m")


def test_every_model_of_the_registry_is_looked_up(tmp_path: Path, tracking_uri: str) -> None:
    uri = tracking_uri
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("tiny")
    for name in ("one", "two"):
        client.create_model_version("tiny", str(tmp_path / name))
    client.set_registered_model_alias("tiny", "champion", "1")
    args = ServeArgs(
        "models:/tiny@champion", more_models=("b=models:/tiny/2", "c=/models/c"), canary="/models/new"
    )
    assert args.name == "tiny"
    assert args.models == {
        "Denoiser": "models:/tiny@champion",
        "Denoiser_canary": "/models/new",
        "Denoiser-b": "models:/tiny/2",
        "Denoiser-c": "/models/c",
    }
    found = with_folders(args, uri)
    assert (found.model, found.model_id) == (str(tmp_path / "one"), "tiny")
    assert (found.canary, found.more_models) == ("/models/new", (f"b={tmp_path / 'two'}", "c=/models/c"))
    plain = ServeArgs("/models/c")
    assert with_folders(plain, uri) == plain
    with pytest.raises(UserError, match="no models:/tiny@challenger in MLflow"):
        with_folders(ServeArgs("/models/c", canary="models:/tiny@challenger"), uri)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model": "m", "more_models": ["b"]}, "more_models must be NAME=URL, not 'b'"),
        ({"model": "m", "more_models": ["b/c=d"]}, "more_models must be NAME=URL"),
        ({"model": "m", "more_models": ["m=d"]}, "two models are called 'm'"),
        ({"model": "m", "models_per_replica": 2}, "models_per_replica means nothing without more_models"),
        ({"model": "m", "canary_share": 0.5}, "canary_share means nothing without canary"),
        ({"model": "m", "canary": "n", "canary_share": 0}, "canary_share must be above 0"),
        ({"model": "m", "key_tokens_per_minute": 5}, "serve: key_tokens_per_minute needs api_keys"),
        ({"model": "m", "cors_origins": ["chat.example.org"]}, "like https://chat.example.org"),
        ({"model": "m", "cors_origins": "https://a.org"}, "cors_origins must be (str, ...)"),
        ({"model": "m", "max_messages": 0}, "max_messages must be at least 1"),
        ({"model": "m", "max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1"),
        ({"model": "m", "max_replica": 3}, "unknown setting max_replica; did you mean 'max_replicas'?"),
        ({"model": "m", "port": "8000"}, "port must be int, not '8000'"),
        ({"model": "m", "port": True}, "port must be int, not True"),
        ({"model": "m", "min_replicas": 3, "max_replicas": 2}, "max_replicas 2 is below min_replicas 3"),
        ({"model": "m", "min_replicas": -1}, "serve: min_replicas must be at least 0, not -1"),
        ({"model": "m", "max_replicas": 0}, "serve: max_replicas must be at least 1, not 0"),
        ({"model": "m", "max_queued_requests": 0}, "-1 or at least 1"),
        ({"model": "m", "max_ongoing_requests": 0}, "max_ongoing_requests must be at least 1"),
        (
            {"model": "m", "target_ongoing_requests": 9.0, "max_ongoing_requests": 8},
            "at most max_ongoing_requests 8",
        ),
        ({"model": "m", "max_body_bytes": 10}, "max_body_bytes must be at least 1024"),
        ({"model": "m", "request_timeout_s": 0.0}, "request_timeout_s must be above 0"),
        ({"model": "m", "max_surge_percent": 101}, "max_surge_percent must be at most 100"),
        ({"model": "m", "target_ongoing_requests": 0}, "target_ongoing_requests must be above 0"),
        ({"model": "m", "sampling": {"step": 3}}, "unknown setting sampling.step; did you mean 'steps'?"),
        ({"model": "m", "sampling": {"steps": -3}}, "steps must be at least 1"),
        ({"model": "m", "sampling": {"steps": "3"}}, "sampling.steps must be int or null, not '3'"),
        ({"model": "m", "sampling": {"threshold": 0.9, "factor": 1}}, "choose one rule"),
        ({"model": "m", "sampling": {"remasking": "rando"}}, "did you mean 'random'?"),
        ({"model": "m", "sampling": 3}, "sampling must hold settings"),
        ({}, "missing setting model"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_args(values)
    assert message in str(caught.value)
