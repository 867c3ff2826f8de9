"""What `pip install` brings: all files of the packages, and what makes `lm_eval` and `llada` known to the environment."""

from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_holds_all_files_and_both_doors(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (listed,) = (name for name in held if name.endswith("entry_points.txt"))
        doors = configparser.ConfigParser()
        doors.read_string(archive.read(listed).decode())
    ours = {
        path.relative_to(ROOT).as_posix()
        for package in ("llada", "pipelines")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix in (".py", ".yaml", ".html", ".css", ".js", ".svg")
    }
    assert {name for name in held if ".dist-info/" not in name} == ours | {"llada_lm_eval.pth"}
    assert doors["console_scripts"]["llada"] == "pipelines.cli:main"
    assert doors["lm_eval.models"]["llada"] == "llada.evals.harness:HarnessModel"
