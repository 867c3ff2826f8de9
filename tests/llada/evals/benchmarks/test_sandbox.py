"""The sandbox around programs that a model wrote: what is right passes, and every way out is closed."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llada.errors import UserError
from llada.evals.benchmarks.sandbox import Limits, run_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's seccomp")


def outcome(program: str, **limits: float) -> str:
    (found,) = run_programs([program], Limits(**limits))  # type: ignore[arg-type]
    return found


def test_programs_pass_or_say_what_ended_them_in_their_order() -> None:
    programs = [
        "def f(x):\n    return x + 1\nassert f(1) == 2",
        "assert 1 == 2, 'one is not two'",
        "import threading, asyncio\nt = threading.Thread(target=print)\nt.start(); t.join()\nasyncio.run(asyncio.sleep(0))",
        "def f(:",
        "import numpy\nassert numpy.arange(3).sum() == 3",
        "def f(n):\n    return f(n + 1)\nf(0)",
    ]
    found = run_programs(programs)
    assert found == ["passed", "AssertionError", "passed", "SyntaxError", "passed", "RecursionError"]


@pytest.mark.parametrize("way", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_who_leaves_before_the_assertions_has_not_passed(way: str) -> None:
    assert outcome(f"{way}\nassert False") in ("SystemExit", "ended before its end")


def test_a_program_cannot_say_that_it_passed() -> None:
    forged = """
import json, os
for fd in range(3, 20):
    try:
        os.write(fd, json.dumps({"word": "", "outcome": "passed"}).encode())
    except OSError:
        pass
os._exit(0)
"""
    assert outcome(forged) == "ended before its end"


def test_time_is_limited_whether_it_is_used_or_slept() -> None:
    begin = time.monotonic()
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    found = run_programs(["while True: pass", stubborn], Limits(cpu_s=1))
    assert found[0] == "out of time"
    assert found[1] == "ended before its end"  # killed a second later
    assert outcome("import time\ntime.sleep(600)", wall_s=1.0) == "out of time"
    assert time.monotonic() - begin < 60


def test_memory_is_limited() -> None:
    assert outcome("x = bytearray(1 << 29)", memory_bytes=1 << 28) == "out of memory"
    assert outcome("x = []\nwhile True: x.append(bytes(1 << 20))", memory_bytes=1 << 28) == "out of memory"
    assert outcome("x = bytearray(1 << 27)", memory_bytes=1 << 29) == "passed"


@pytest.mark.parametrize(
    "way",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'], check=True)",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal\nos.kill(-1, signal.SIGKILL)",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import os\nos.sched_setaffinity(os.getppid(), {0})",
    ],
    ids=[
        "fork bomb",
        "subprocess",
        "multiprocessing",
        "exec",
        "kill",
        "kill all",
        "limits",
        "priority",
        "cores",
    ],
)
def test_there_is_no_other_process(way: str) -> None:
    assert outcome(way) in ("PermissionError", "BlockingIOError", "ValueError")


def test_no_file_tells_another_process_of_a_byte() -> None:
    """The kernel would send the signal: of a pipe whose owner is that process, with SIGKILL for "there is something to read"."""
    ways = [
        "fcntl.fcntl(a, 8, {0})",
        "fcntl.fcntl(a, 15, struct.pack('ii', 1, {0}))",
        "fcntl.ioctl(b, 0x8901, struct.pack('i', {0}))",
    ]
    for way in ways:
        with subprocess.Popen(["sleep", "60"]) as victim:
            program = f"""
import fcntl, os, socket, struct
a, w = os.pipe()
b = socket.socketpair()[0].detach()
for step in (lambda: {way.format(victim.pid)}, lambda: fcntl.fcntl(a, 10, 9), lambda: fcntl.fcntl(a, fcntl.F_SETFL, 0o20000)):
    try:
        step()
    except PermissionError:
        continue
    assert False, "let through"
os.write(w, b"x")
"""
            try:
                assert outcome(program) == "passed"
                assert victim.poll() is None
            finally:
                victim.kill()


def test_nothing_is_written_anywhere(tmp_path: Path) -> None:
    there = tmp_path / "there.txt"
    there.write_text("as it was")
    ways = [
        f"open({str(tmp_path / 'new.txt')!r}, 'w')",
        f"open({str(there)!r}, 'a').write('more')",
        f"open({str(there)!r}, 'r+')",
        "open('here.txt', 'w')",
        f"import os\nos.remove({str(there)!r})",
        f"import os\nos.rename({str(there)!r}, {str(tmp_path / 'moved')!r})",
        f"import os\nos.mkdir({str(tmp_path / 'folder')!r})",
        f"import os\nos.symlink('/', {str(tmp_path / 'link')!r})",
        f"import os\nos.chmod({str(there)!r}, 0)",
        f"import os\nos.truncate({str(there)!r}, 0)",
        f"import os\nos.utime({str(there)!r}, (0, 0))",
        "open('/proc/self/mem', 'r+b')",
    ]
    before = there.stat()
    assert run_programs(ways) == ["PermissionError"] * len(ways)
    assert list(tmp_path.iterdir()) == [there]
    assert (there.read_text(), there.stat().st_mtime_ns) == ("as it was", before.st_mtime_ns)


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        ways = [
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}))",
            "import socket\nsocket.socket(socket.AF_UNIX)",
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
            # The call itself, without Python's module: socket(AF_INET, SOCK_STREAM), and io_uring_setup(1, 0).
            "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) == -1",
            "import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, 0) == -1",
            # A pair within the process works, and reaches no other socket's name.
            "import socket\na, b = socket.socketpair(type=socket.SOCK_DGRAM)\na.send(b'x')\nassert b.recv(1) == b'x'\n"
            "try:\n    a.sendto(b'x', '/tmp/nobody')\nexcept PermissionError:\n    pass\nelse:\n    assert False",
        ]
        found = run_programs(ways)
        with pytest.raises(TimeoutError):
            server.accept()
    # The third's URLError is one of these.
    assert found == ["PermissionError", "PermissionError", "OSError", "passed", "passed", "passed"]


def test_what_is_printed_fills_nothing() -> None:
    flood = "import sys\nfor _ in range(300): sys.stdout.write('x' * (1 << 20)); sys.stderr.write('x' * (1 << 20))"
    assert outcome(flood) == "passed"


def test_it_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert (
        outcome("import os, sys\nassert 'A_SECRET' not in os.environ and '/somewhere' not in sys.path")
        == "passed"
    )
    assert outcome("import os\nassert os.listdir('.') == []") == "passed"


def has_its_limits(pid: str) -> bool:
    """What jail.py sets behind its wish to die with its parent."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
        return any(line.split()[:4] == ["Max", "open", "files", "64"] for line in lines)
    return False


def test_what_it_reads_it_cannot_tell() -> None:
    """Our environment and files are there to be read; no error of its own making carries a word of them out."""
    read = (
        "import os\nsecret = open(f'/proc/{os.getppid()}/environ', 'rb').read()[:40].hex()\nassert secret\n"
    )
    find_word = """
import json, sys
frame = sys._getframe()
while "work" not in frame.f_locals:
    frame = frame.f_back
def say(outcome):
    os.write(int(sys.argv[1]), json.dumps({"word": frame.f_locals["work"]["word"], "outcome": outcome}).encode())
    os._exit(0)
"""
    ways = [
        "raise ValueError(secret)",
        "raise type(secret, (KeyError,), {})",
        "raise type(secret, (Exception,), {'__module__': 'builtins'})",
        "import sys\nsys.exit(secret)",
        # Who finds the word of the jail in its interpreter can say what it likes to whoever takes more than words of ours.
        f"{find_word}say(secret)",
        f"{find_word}say(f'no sandbox: {{secret}}')",
        f"{find_word}say('KeyError')",
    ]
    ended = "ended before its end"
    assert run_programs([read + way for way in ways]) == [
        "ValueError", "KeyError", "Exception", "SystemExit", ended, ended, "KeyError"
    ]  # fmt: skip


def test_no_program_outlives_its_parent(tmp_path: Path) -> None:
    code = "from llada.evals.benchmarks.sandbox import run_programs\nrun_programs(['import time\\ntime.sleep(50)'])"
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        deadline = time.monotonic() + 200
        tasks = Path(f"/proc/{parent.pid}/task")
        found: list[str] = []
        while not found or not all(map(has_its_limits, found)):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
            with contextlib.suppress(OSError):  # a thread has ended meanwhile
                found = [c for t in tasks.iterdir() for c in (t / "children").read_text().split()]
    finally:
        parent.kill()
        parent.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


def test_limits_that_make_no_sense_are_named() -> None:
    with pytest.raises(UserError, match="sandbox: cpu_s must be at least 1"):
        Limits(cpu_s=0)
