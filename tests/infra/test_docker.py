"""The image: linted, nobody's root, made of what is there; and its steps run in a virtual environment, without Docker."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
# (stage, instruction, the rest of it)
STEPS: list[tuple[str, str, str]] = []
_stage = ""
for _line in (
    re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ").splitlines()
):
    if _line.strip():
        _instruction, _, _rest = _line.strip().partition(" ")
        _stage = _rest.split(" AS ")[1] if _instruction == "FROM" else _stage
        STEPS.append((_stage, _instruction, _rest))


def of(stage: str, instruction: str) -> list[str]:
    return [rest for where, what, rest in STEPS if (where, what) == (stage, instruction)]


def test_hadolint_finds_nothing():
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", DOCKERFILE],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_is_nobodys_root_and_says_how_it_is(target: str):
    assert STEPS[[stage for stage, *_ in STEPS].index(target)][2] == f"base AS {target}"
    assert [step[1:] for step in STEPS if step[0] == target][-1] == ("USER", "1000:1000")
    assert of("base", "HEALTHCHECK")
    assert of("base", "ENTRYPOINT") == ['["llada"]']
    (environment,) = of("base", "ENV")
    written = {name: value for name, value in re.findall(r"(\w+)=(\S+)", environment) if "/tmp" in value}
    assert written.keys() == {"HOME", "XDG_CACHE_HOME", "LLADA_CACHE", "MPLCONFIGDIR"}
    # Of what builds it, only the finished environment comes along.
    assert of(target, "COPY") == [f"--from=sbom-{target} /opt/llada /opt/llada"]


def test_images_of_manifests_are_built():
    named = {
        image
        for path in (ROOT / "infra").rglob("*.yaml")
        for image in re.findall(r"image: llada:(\w+)", path.read_text())
    }
    assert named == {"cpu", "cuda"}


def test_all_base_images_are_pinned():
    stages = {stage for stage, *_ in STEPS}
    for _, instruction, rest in STEPS:
        if instruction == "FROM" and (image := rest.split()[0]) not in stages:
            assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", image)


def test_what_is_copied_is_there_and_not_ignored():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    copied = {
        source
        for _, instruction, rest in STEPS
        if instruction == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied == let_through
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_steps_make_a_command_that_runs(tmp_path: Path):
    """All of it but the base image: dependencies by the constraints, the package, the list of what is in it."""
    build = tmp_path / "build"
    build.mkdir()
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "TORCH_INDEX": ""}
    for stage in ("dependencies", "build-cpu", "sbom-cpu"):
        for where, instruction, rest in STEPS:
            if where != stage:
                continue
            if instruction == "COPY":
                *sources, _ = rest.split()
                for source in sources:
                    name = source if (ROOT / source).is_dir() else Path(source).name
                    copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                    copy(ROOT / source, build / name)
            elif instruction == "RUN":
                command = rest.replace("/opt/", f"{tmp_path}/opt/").replace("python -", f"{sys.executable} -")
                done = subprocess.run(
                    ["bash", "-ec", command.replace('PIP_EXTRA_INDEX_URL="$TORCH_INDEX"', "")],
                    cwd=build, env=environment, capture_output=True, text=True, timeout=1500, check=False,
                )  # fmt: skip
                assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    shutil.rmtree(build)
    command = tmp_path / "opt/llada/bin/llada"
    done = subprocess.run(
        [command, "plan", "tiny"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = {
        part["name"]: part
        for part in json.loads((tmp_path / "opt/llada/sbom.cdx.json").read_text())["components"]
    }
    assert {"torch", "ray", "mlflow", "llada-pipelines"} <= parts.keys()
    pinned = dict(
        line.split("==") for line in (ROOT / "infra/constraints.txt").read_text().splitlines() if "==" in line
    )
    assert parts["ray"]["version"] == pinned["ray"]
