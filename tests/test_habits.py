"""What surrounds the code: make's targets, CI, the hooks before a commit, and the files that CONTRIBUTING.md names."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_make_help_explains_every_target():
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    # Without the marks of a `make test` around it: make would announce the directory of a make below it.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "help"]
    shown = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in shown.splitlines()] == targets.split()
    assert all(len(line.split()) > 2 for line in shown.splitlines())


def test_ci_runs_what_a_developer_runs_on_every_python_we_support():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert any("make test" in step.get("run", "") for step in job["steps"])
    assert job["strategy"]["matrix"]["python-version"] == ["3.11", "3.12"]
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("make test")


def test_hooks_are_the_tools_of_make_lint():
    makefile = (ROOT / "Makefile").read_text()
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    assert repository["repo"] == "local", "nothing is downloaded"
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    assert tools == {"ruff", "mypy"}
    assert all(f"$(BIN)/{tool}" in makefile for tool in tools)


def test_the_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:llada|pipelines|tests|infra|ray_configs)/[\w./]+)`", text))
    to_be_added = {name for name in named if name.endswith("csv.py")}
    assert len(named - to_be_added) > 5
    for name in named - to_be_added:
        assert (ROOT / name).exists(), name
