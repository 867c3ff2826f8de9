"""What has a linter is linted: shell scripts, the GitHub workflow."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def lint(*words: str | Path) -> tuple[int, str]:
    """(exit code, what it says) of a linter of the `dev` extra."""
    command = [BIN / words[0], *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stdout + done.stderr


def test_shell_scripts():
    scripts = [*sorted((ROOT / "infra").rglob("*.sh")), ROOT / ".ci" / "run"]
    assert len(scripts) >= 3
    # 1090: what a script reads in stands on another machine.
    assert lint("shellcheck", "--exclude=SC1090", *scripts) == (0, "")


def test_the_workflow():
    """Its schema too, and that no action can change under its name."""
    code, said = lint("zizmor", "--offline", "--no-progress", ".github")
    assert code == 0, said


def test_a_workflow_with_a_misspelt_key_is_refused(tmp_path: Path):
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    (tmp_path / "ci.yml").write_text(text.replace("    steps:", "    stepz:"))
    assert lint("zizmor", "--offline", "--no-progress", tmp_path / "ci.yml")[0] != 0


# Keys of AWS, private keys, and what stands behind a word like "password" and is no name of a place.
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|(?:password|passwd|secret|token|api_?key)\w*[\"']?\s*[:=]\s*[\"']?(?![a-z_-]+\b)[\w/+-]{12,}",
    re.IGNORECASE,
)


@pytest.mark.parametrize(
    "line", ["aws_key: AKIAIOSFODNN7EXAMPLE", "password: hunter2hunter2", 'auth_token = "9f8e7d6c5b4a39"']
)
def test_a_secret_is_recognised(line: str):
    assert SECRET.search(line)


def test_no_secret_stands_in_a_file():
    """They are made by commands (infra/README.md)."""
    for folder in ("infra", "ray_configs", ".github"):
        for path in (ROOT / folder).rglob("*"):
            if (
                path.is_file()
                and path.suffix not in (".png", ".svg", ".gif")
                and path.name != "constraints.txt"
            ):
                assert not (found := SECRET.search(path.read_text())), (path, found)
                assert not re.search(r"^kind: Secret$", path.read_text(), re.MULTILINE), path
