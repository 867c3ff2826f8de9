"""A Serve configuration on a running cluster whose nodes have none of our code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

Command = Callable[..., tuple[int, str, str]]


def write(path: Path, port: int = 8000, /, **args: Any) -> str:
    """A configuration of our application."""
    application = {"name": "llada", "import_path": "pipelines.serve:build_app", "args": args}
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_what_cannot_be_deployed_is_refused_here(tmp_path, llada: Command):
    """Before any server is asked."""
    file = tmp_path / "serve.yaml"
    words = (str(file), "--address", "http://127.0.0.1:9")
    write(file, model="/m")
    file.write_text(file.read_text().replace("http_options", "http_option"))
    code, _, err = llada("deploy", *words)
    assert (code, err) == (
        1,
        f"llada deploy: {file}: unknown key http_option; did you mean 'http_options'?\n",
    )
    write(file, model="/m")
    code, _, err = llada("deploy", *words)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "no job server at http://127.0.0.1:9" in err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_clone_to_an_answer(
    ray_cluster, random_model, tmp_path, llada: Command, monkeypatch, free_port
):
    """The code travels, or is there; a version that cannot start leaves the one before; the champion is served."""
    from pipelines.stage.delivery import Delivery

    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_cluster.token)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_cluster.address)
    port = free_port()
    file, uri = tmp_path / "serve.yaml", f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = Delivery(uri, str(random_model))
    run.open("a run", {})
    run(("model", {"name": "tiny-sft", "url": str(random_model), "step": 1}))
    run.client.set_registered_model_alias("tiny-sft", "champion", "1")
    small = {"max_ongoing_requests": 2, "cpus_per_replica": 1}
    code, _, err = llada(
        "deploy", write(file, port, model="models:/tiny-sft@champion", **small), "--tracking-uri", uri
    )
    assert code == 0, err
    assert err.splitlines()[0] == f"models:/tiny-sft@champion: {random_model}"
    assert err.splitlines()[-1].startswith("llada: RUNNING")

    def ask() -> httpx.Response:
        body = {"model": "tiny-sft", "prompt": "Go", "max_tokens": 4, "steps": 2}
        return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)

    assert ask().status_code == 200
    code, _, err = llada("deploy", write(file, port, model=str(tmp_path / "none"), **small))
    assert code == 1
    assert f"what was served before goes on: cannot serve {tmp_path / 'none'}" in err.splitlines()[-1]
    assert ask().status_code == 200
    code, _, err = llada("deploy", "--code", "image", write(file, port, model=str(random_model), **small))
    assert code == 0, f"these nodes have the code: {err}"
