"""The way to a job server, and what of our code travels to it. (A real one: tests/pipelines/test_submit.py.)"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from llada.errors import UserError
from pipelines.stage import job_server
from pipelines.stage.artifact import git_commit
from pipelines.stage.job_server import auth_headers, code_environment, server_address

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_address_that_is_given_comes_first(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert server_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://ray.example.org/")
    assert server_address(None) == "https://ray.example.org"
    assert server_address("http://other:8265") == "http://other:8265"
    with pytest.raises(UserError, match="must be http://host:8265 or https://…, not 'ray://head:10001'"):
        server_address("ray://head:10001")


def test_the_token_is_where_ray_looks_for_it(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert auth_headers() == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("at home\n")
    assert auth_headers() == {"Authorization": "Bearer at home"}
    (tmp_path / "token").write_text("of a file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert auth_headers() == {"Authorization": "Bearer of a file"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "itself")
    assert auth_headers() == {"Authorization": "Bearer itself"}
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"cannot read the token in \$RAY_AUTH_TOKEN_PATH"):
        auth_headers()


def test_the_packages_of_this_process_travel_beside_the_environments_own():
    given = {"py_modules": ["s3://bucket/more.zip"], "pip": ["x"], "env_vars": {"A": "1"}}
    with code_environment("here", given) as environment:
        assert environment["py_modules"] == [
            str(REPOSITORY / "llada"),
            str(REPOSITORY / "pipelines"),
            "s3://bucket/more.zip",
        ]
        assert environment["env_vars"] == {"LLADA_GIT_COMMIT": git_commit(), "A": "1"}
        assert environment["pip"] == ["x"]
    assert given == {"py_modules": ["s3://bucket/more.zip"], "pip": ["x"], "env_vars": {"A": "1"}}


def test_nothing_travels_to_an_image_that_has_it():
    with code_environment("image", {"image_uri": "registry/llada:1"}) as environment:
        assert set(environment) == {"image_uri", "env_vars"}
    for name in ("image_uri", "working_dir"):
        message = f"runtime_env.{name} brings code of its own: with --code image"
        with pytest.raises(UserError, match=message), code_environment("here", {name: "x"}):
            pass


def test_a_wheel_is_the_packages_in_it(tmp_path):
    wheel = tmp_path / "llada_pipelines-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in job_server.PACKAGES:
            archive.writestr(f"{name}/__init__.py", f"# {name}")
        archive.writestr("llada_pipelines-0.1.0.dist-info/METADATA", "")
    with code_environment(str(wheel), {}) as environment:
        texts = [Path(folder, "__init__.py").read_text() for folder in environment["py_modules"]]
    assert texts == ["# llada", "# pipelines"]
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("llada/__init__.py", "")
    for path, message in ((other, "does not hold llada and pipelines"), (tmp_path / "none.whl", "is none")):
        with pytest.raises(UserError, match=message), code_environment(str(path), {}):
            pass
