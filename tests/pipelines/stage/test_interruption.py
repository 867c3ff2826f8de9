"""Ctrl-C and SIGTERM, in processes of their own: raised, raised again in the clean-up, never lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
# What every program begins with; `send` is what a person does at the terminal.
BEGIN = """
import os, signal, sys, time
from pipelines.stage.interruption import interruptible
from pipelines.stage.command import exit_codes
def send(name): os.kill(os.getpid(), getattr(signal, "SIG" + name))
"""


def run(program: str) -> tuple[int, list[str], str]:
    """Exit code, lines of standard output, standard error."""

    def default() -> None:  # whoever runs the tests may ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=default,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143)])
def test_a_stage_says_that_it_goes_on_and_cleans_up(name, code):
    program = f"""
with exit_codes("pretrain", "out"):
    try:
        send({name!r}); time.sleep(60)
    finally:
        print("cleaned up")
"""
    assert run(program) == (
        code,
        ["cleaned up"],
        "llada pretrain: interrupted; the same command goes on where it stopped\n",
    )


def test_what_does_not_go_on_does_not_say_so():
    assert run("with exit_codes('plan'): send('INT')")[::2] == (130, "llada plan: interrupted\n")


def test_the_second_signal_cuts_the_clean_up_short_and_the_third_ends_the_process():
    program = """
with exit_codes("pretrain", "out"):
    try:
        send("INT")
    finally:
        try:
            send("INT")
        finally:
            print("in the clean-up", flush=True)
            {third}
"""
    code, out, err = run(program.format(third="pass"))
    assert (code, out, len(err.splitlines())) == (130, ["in the clean-up"], 1)
    assert run(program.format(third="send('INT'); print('not here')"))[:2] == (130, ["in the clean-up"])


@pytest.mark.parametrize(
    "where",
    [
        "class Thing:\n    def __del__(self): send('TERM')\nThing()",  # Python drops what a destructor raises
        "os.register_at_fork(after_in_parent=lambda: send('TERM'))\nos.fork() or os._exit(0)",
    ],
    ids=["destructor", "fork"],
)
def test_a_signal_is_not_lost(where):
    body = "\n".join("    " + line for line in where.splitlines())
    code, out, err = run(f"with exit_codes('x'):\n{body}\n    time.sleep(60)\n    print('lost')")
    assert (code, out, err) == (143, [], "llada x: interrupted\n")


def test_what_is_ignored_stays_ignored():
    """As a shell does for a job in the background."""
    program = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
with interruptible():
    send("INT")
    print("went on")
"""
    assert run(program) == (0, ["went on"], "")


def test_handlers_are_those_of_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    from pipelines.stage.interruption import handlers_kept, interruptible

    with interruptible():
        ours = signal.getsignal(signal.SIGTERM)
        with handlers_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is ours
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
