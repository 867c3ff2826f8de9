"""The command `deploy`: a Serve configuration on a running cluster, with the code that it needs.

    llada deploy ray_configs/serve.yaml [--address http://head:8265]

What Ray's `serve deploy` does, and what it leaves to chance: the file is read strictly; of our applications the code
travels, and `model: models:/NAME@ALIAS` is looked up now, so that the same file rolls over to the champion of the day; and
the command waits until the endpoint answers or says why it does not. A version that does not start leaves the one before
answering. As with `serve deploy`, the file is the whole of what is served: an application that is not in it goes.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from llada.errors import UserError
from llada.settings import load_yaml, require
from pipelines.manifests.serve_config import find_mistakes
from pipelines.serving.args import parse_args, with_folders
from pipelines.stage.command import parse, run_command
from pipelines.stage.job_server import code_environment, serve_server, server_address
from pipelines.stage.tracking import default_tracking_uri

OUR_APPLICATIONS = "pipelines.serve:"
_POLL_S = 1.0
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


@dataclass(frozen=True)
class DeployArgs:
    """Serve what a configuration says on a running cluster; wait until it answers. Exit code 1 when it does not."""

    file: Annotated[str, tyro.conf.Positional]
    """Serve configuration, such as ray_configs/serve.yaml."""
    address: str | None = None
    """The job server's, http://host:8265 or https://…; default $RAY_API_SERVER_ADDRESS, else this machine's."""
    code: str = "here"
    """"here" sends the packages of this installation, "image" nothing, because the nodes have them; or a wheel."""
    tracking_uri: str | None = None
    """MLflow of models:/…; default $MLFLOW_TRACKING_URI, else mlflow.db in this folder."""
    wait: bool = True
    """Until all applications answer."""


def main(argv: Sequence[str]) -> None:
    """`llada deploy FILE`"""
    args = parse(DeployArgs, argv, "deploy")
    config = load_yaml(args.file, "Serve configuration")
    if mistakes := find_mistakes(config):
        more = f", and {len(mistakes) - 1} more: llada check {args.file}" if mistakes[1:] else ""
        raise UserError(f"{args.file}: {mistakes[0]}{more}")
    uri = args.tracking_uri or default_tracking_uri("endpoint")
    with serve_server(server_address(args.address)) as client, contextlib.ExitStack() as sent:
        applications = [
            sent.enter_context(_complete(application, client, args.code, uri))
            for application in config["applications"]
        ]
        client.deploy_applications({**config, "applications": applications})
        if args.wait:
            wait_running(client, [application.get("name", "default") for application in applications])


@contextlib.contextmanager
def _complete(
    application: Mapping[str, Any], client: Any, code: str, tracking_uri: str
) -> Iterator[Mapping[str, Any]]:
    """An application of ours with its code at the server and its model's folder; any other is as it was."""
    if not application["import_path"].startswith(OUR_APPLICATIONS):
        yield application
        return
    values = dict(application.get("args") or {})
    require("model" in values, f"{application.get('name', 'default')}: args.model is missing")
    asked = parse_args(values)
    if (found := with_folders(asked, tracking_uri)) != asked:
        for url, folder in zip(asked.models.values(), found.models.values(), strict=True):
            if url != folder:
                print(f"{url}: {folder}", file=sys.stderr)
        changed: dict[str, Any] = {"model": found.model, "model_id": found.model_id, "canary": found.canary}
        changed |= {"more_models": list(found.more_models)}
        values |= {name: value for name, value in changed.items() if value}
    with code_environment(code, application.get("runtime_env") or {}) as environment:
        # Private; `serve deploy` has no public way for what is on this machine's disk.
        client._upload_py_modules_if_needed(environment)
        environment.pop("excludes", None)
        yield {**application, "args": values, "runtime_env": environment}


def wait_running(client: Any, names: Sequence[str]) -> None:
    """Until these applications answer; tells what they wait for. Raises UserError with why one does not start."""
    told: dict[str, str] = {}
    while True:
        there = client.get_serve_details()["applications"]
        states = {name: there[name] for name in names if name in there}
        for name, state in states.items():
            if state["status"] in _FAILED:
                raise UserError(
                    f"{name} does not start, and what was served before goes on: {_reason(state)}"
                )
            message = f"{name}: {state['status']} {_reason(state)}".strip()
            if told.get(name) != message:
                told[name] = message
                print(message, file=sys.stderr)
        if len(states) == len(names) and all(state["status"] == "RUNNING" for state in states.values()):
            return
        time.sleep(_POLL_S)


def _reason(state: Mapping[str, Any]) -> str:
    """What Serve says of an application and of its deployments: the last line of a traceback, and what waits for room."""
    messages = [state.get("message", ""), *(one["message"] for one in state.get("deployments", {}).values())]
    return "; ".join(dict.fromkeys(text.strip().splitlines()[-1] for text in messages if text.strip()))


if __name__ == "__main__":
    run_command("deploy")
