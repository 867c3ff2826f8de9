"""Nights without Kubernetes: the units and scripts are well-formed, and one night at a time runs, tells, and is caught up."""

from __future__ import annotations

import configparser
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.stage.command import parse_entrypoint

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "schedule"
UNITS = sorted(path for path in FOLDER.iterdir() if path.suffix in (".service", ".timer"))


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((FOLDER / name).read_text())
    return parser


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_units(tmp_path: Path):
    for path in UNITS:
        # The command is installed where the units are, and not here.
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/llada/bin/llada ", "/bin/true "))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / path.name) for path in UNITS)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_units_say_what_is_promised():
    """One at a time (a oneshot unit), caught up, told when it fails, and a command that parses."""
    service, timer = unit("llada-prepare.service"), unit("llada-prepare.timer")
    assert service["Service"]["Type"] == "oneshot"
    assert timer["Timer"]["Persistent"] == "true"
    template, _, instance = service["Unit"]["OnFailure"].partition("@")
    assert instance == "%n.service"
    assert (FOLDER / f"{template}@.service").exists()
    parse_entrypoint(service["Service"]["ExecStart"].replace("/opt/llada/bin/", ""))
    (command,) = [
        line
        for line in (FOLDER / "night.sh").read_text().replace("\\\n", "").splitlines()
        if line.startswith("llada ")
    ]
    of_cron, of_systemd = command.split(" 9>&-")[0], service["Service"]["ExecStart"].split("bin/")[1]
    assert of_cron.replace('"', "").split() == of_systemd.replace("{", "").replace("}", "").split()


def test_anacrontab_has_one_job_a_day():
    lines = [line for line in (FOLDER / "anacrontab").read_text().splitlines() if not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines if "=" in line)
    assert settings.keys() == {"SHELL", "PATH", "START_HOURS_RANGE"}
    (job,) = (line.split(maxsplit=3) for line in lines if "=" not in line)
    assert job == ["1", "10", "llada-prepare", "/usr/local/bin/llada-night"]


def night(folder: Path, prepare: str) -> subprocess.CompletedProcess[str]:
    """A night with programs of that name that do what is said, and a curl that keeps what it is told."""
    for name, program in (("llada", prepare), ("curl", 'echo "$@" >> "$FOLDER/told"')):
        (folder / name).write_text(f"#!/bin/sh\n{program}\n")
        (folder / name).chmod(0o755)
    (folder / "prepare.env").write_text("LLADA_BUCKET=s3://bucket\nLLADA_ALERT_URL=http://alerts.example\n")
    return subprocess.run(
        ["sh", FOLDER / "night.sh"],
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "FOLDER": str(folder),
            "LLADA_ENV": str(folder / "prepare.env"),
            "LLADA_LOCK": str(folder / "lock"),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_night_is_told_when_it_fails_and_only_then(tmp_path: Path):
    assert night(tmp_path, 'echo "$@" > "$FOLDER/words"').returncode == 0
    assert not (tmp_path / "told").exists()
    assert "--input s3://bucket/raw --output s3://bucket/data" in (tmp_path / "words").read_text()
    assert night(tmp_path, "exit 7").returncode == 7
    assert "failed with exit code 7" in (tmp_path / "told").read_text()


def test_a_second_night_beside_one_is_left_out(tmp_path: Path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = night(tmp_path, 'touch "$FOLDER/ran"')
        assert (done.returncode, done.stderr) == (0, "a night is still at work: this one is left out\n")
        assert not (tmp_path / "ran").exists()
    assert night(tmp_path, 'touch "$FOLDER/ran"').returncode == 0
    assert (tmp_path / "ran").exists()
