"""A Ray cluster's job server, seen from outside: where it is, the token it wants, and how our code gets there.

What travels is content-addressed: the same code is sent once. Ray's client is used as it is; what it says of its server is
told in one line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import llada
from llada.errors import UserError
from llada.settings import require
from pipelines.stage.artifact import git_commit

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Ray's own names for where the server and the token are.
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_TOKEN, _TOKEN_FILE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
PACKAGES = ("llada", "pipelines")
EXCLUDED = ["**/__pycache__"]
# Those of a runtime environment that bring code of their own.
_BRINGS_CODE = ("py_modules", "working_dir", "image_uri", "container")

# Ray's client raises a bare RuntimeError.
_REFUSED = "Request failed with status code "


def server_address(given: str | None) -> str:
    """The job server's: what was given, else $RAY_API_SERVER_ADDRESS, else this machine's. Raises UserError."""
    address = given or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    require(
        address.startswith(("http://", "https://")),
        f"the job server's address must be http://host:8265 or https://…, not {address!r}",
    )
    return address.rstrip("/")


def auth_headers() -> dict[str, str]:
    """The token, where there is one: $RAY_AUTH_TOKEN, the file $RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token."""
    token = os.environ.get(_TOKEN)
    if not token:
        path = Path(os.environ.get(_TOKEN_FILE) or Path.home() / ".ray" / "auth_token")
        try:
            token = path.read_text().strip()
        except OSError as error:
            require(_TOKEN_FILE not in os.environ, f"cannot read the token in ${_TOKEN_FILE}: {error}")
    return {"Authorization": f"Bearer {token}"} if token else {}


@contextlib.contextmanager
def job_server(address: str) -> Iterator[Any]:
    """Ray's JobSubmissionClient for a `with` block, in which what the server or the way to it refuses is a UserError."""
    with _told(address):
        from ray.job_submission import JobSubmissionClient

        _hush()
        # Ray lets these win over the address that its client is given.
        others = {name: os.environ.pop(name, None) for name in (ADDRESS_VARIABLE, "RAY_ADDRESS")}
        try:
            client = JobSubmissionClient(address, headers=auth_headers())
        finally:
            os.environ.update({name: value for name, value in others.items() if value is not None})
        yield client


@contextlib.contextmanager
def serve_server(address: str) -> Iterator[Any]:
    """Ray Serve's client of the same server."""
    with _told(address):
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        _hush()
        yield ServeSubmissionClient(address, headers=auth_headers())


def _hush() -> None:
    """Ray tells of each package that it sends, over several lines."""
    for name in logging.root.manager.loggerDict:
        if name.startswith(("ray.dashboard", "ray._private.runtime_env")):
            logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            f"the job server at {address} does not let us in ({_first_line(error)}): give the cluster's token in "
            f"${_TOKEN}, or its file in ${_TOKEN_FILE}"
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise UserError(
            f"no job server at {address} ({_first_line(error)}): give its --address, or the way to it "
            "(`kubectl port-forward`, `ray dashboard`)"
        ) from error

    except RuntimeError as error:
        if not str(error).startswith(_REFUSED):
            raise
        raise UserError(f"the job server at {address}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- What travels -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def code_environment(code: str, environment: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """For a `with` block, the runtime environment in which our code is found there: `environment`, which itself may bring
    more modules, and beside it

    code    "here"      the packages of this process, a clone's or an installation's
            "image"     nothing: what runs there has them
            a wheel     the packages in it; what they need is in the image, or in the environment's `pip`

    Raises UserError when the environment already brings code in a way that excludes ours.
    """
    environment = dict(environment)
    env_vars = {"LLADA_GIT_COMMIT": git_commit() or "", **environment.get("env_vars", {})}
    environment["env_vars"] = {name: str(value) for name, value in env_vars.items() if value != ""}
    if code == "image":
        yield environment
        return
    if excluding := [name for name in _BRINGS_CODE[1:] if name in environment]:
        raise UserError(
            f"runtime_env.{excluding[0]} brings code of its own: with --code image ours has to be part of it"
        )
    environment["excludes"] = [*environment.get("excludes", []), *EXCLUDED]
    own = environment.get("py_modules", [])
    if code == "here":
        root = Path(llada.__file__).parents[1]
        environment["py_modules"] = [*(str(root / name) for name in PACKAGES), *own]
        yield environment
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(code) as wheel:
                wheel.extractall(folder)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f'--code is "here", "image" or a wheel, and {code!r} is none: {error}') from None
        require(
            all(Path(folder, name, "__init__.py").is_file() for name in PACKAGES),
            f"the wheel {code} does not hold {' and '.join(PACKAGES)}",
        )
        environment["py_modules"] = [*(str(Path(folder, name)) for name in PACKAGES), *own]
        yield environment
