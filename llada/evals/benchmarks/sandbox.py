"""Programs that a model wrote, run apart from everything: each in a process of its own behind the wall of jail.py, in an empty
temporary folder and environment, and ended when its time is over. What they print goes nowhere, and all that is kept of them is a
word of ours: a program can read what the user can (such as this process' environment, in /proc), and must not tell it in an error's text.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llada.errors import UserError
from llada.evals.benchmarks.jail import KINDS
from llada.settings import check_limits, limited

PASSED = "passed"
_JAIL = Path(__file__).with_name("jail.py")
_NO_SANDBOX = "no sandbox: "
_LONGEST_REPORT = 1 << 16
_OUTCOMES = {PASSED, "out of memory", *(kind.__name__ for kind in KINDS)}


@dataclass(frozen=True)
class Limits:
    """Of one program."""

    cpu_s: int = limited(3, low=1)
    """Seconds of CPU; lm_eval and HumanEval's authors give three seconds. Counted so, a busy machine fails no program."""
    wall_s: float = limited(60.0, above=0)
    """Seconds in all, for a program that waits."""
    memory_bytes: int = limited(1 << 30, low=1 << 26)
    """Of address space."""

    def __post_init__(self) -> None:
        check_limits(self, "sandbox")


def run_programs(programs: Sequence[str], limits: Limits = Limits()) -> list[str]:
    """What came of each: "passed" if it was run to its end, else what ended it ("AssertionError", "out of time").

    Raises UserError where there is no sandbox: another system than Linux on x86-64 or arm64, or one without seccomp.
    """
    if sys.platform != "linux":
        raise UserError("programs cannot be run here: the sandbox needs Linux (seccomp)")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: _run(program, limits), programs))


def _run(program: str, limits: Limits) -> str:
    word = secrets.token_hex(16)
    work = {"program": program, "word": word, "cpu_s": limits.cpu_s, "memory_bytes": limits.memory_bytes}
    reading, writing = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="llada-program-") as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(_JAIL), str(writing)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=(writing,),
                start_new_session=True,
            )
            os.close(writing)
            writing = -1
            assert process.stdin is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(work).encode())
                    process.stdin.close()
                report, is_late = _read(reading, time.monotonic() + limits.wall_s)
            finally:
                process.kill()
                process.wait()
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    outcome = _outcome(report, word)
    if outcome is not None:
        if outcome.startswith(_NO_SANDBOX):
            reason = os.strerror(int(outcome.removeprefix(_NO_SANDBOX)))
            raise UserError(f"programs cannot be run here, for there is no sandbox ({reason})")
        return outcome
    if is_late or process.returncode == -signal.SIGXCPU:
        return "out of time"
    return "ended before its end"


def _read(fd: int, deadline: float) -> tuple[bytes, bool]:
    """What is written until the other end is closed, and whether the deadline came first."""
    report = b""
    while len(report) < _LONGEST_REPORT:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return report, True
        if not (more := os.read(fd, _LONGEST_REPORT)):
            break
        report += more
    return report, False


def _outcome(report: bytes, word: str) -> str | None:
    """What the jail says; None: nothing, or the program wrote in its place."""
    try:
        said = json.loads(report)
        outcome, is_own = str(said["outcome"]), secrets.compare_digest(str(said["word"]), word)
    except (ValueError, KeyError, TypeError):
        return None
    is_known = outcome in _OUTCOMES or re.fullmatch(rf"{_NO_SANDBOX}\d{{1,3}}", outcome, re.ASCII)
    return outcome if is_own and is_known else None
