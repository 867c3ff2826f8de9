"""Ctrl-C and SIGTERM: both raise KeyboardInterrupt in the main thread, whatever a library does to the signals.

with interruptible():
    ...                   # the first signal raises; the second too, within the clean-up; the third ends the process
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Who asks more often does not want to wait for the clean-up.
_PATIENT_SIGNALS = 2
_AGAIN_S = 0.1
_received: list[int] = []


def exit_code() -> int:
    """What a command ends with that was interrupted: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (_received[0] if _received else signal.SIGINT)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """For a `with` block (of the main thread; elsewhere nothing happens), SIGINT and SIGTERM raise KeyboardInterrupt.

    A signal that the parent process has told us to ignore (nohup, a shell's background job) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    complain = sys.unraisablehook

    def send_again(lost: Any) -> None:
        """Python drops what is raised in a destructor or while it forks: then the signal comes once more."""
        number = None
        if _received and issubclass(lost.exc_type, KeyboardInterrupt):
            number = _received.pop()
        elif issubclass(lost.exc_type, SystemExit):  # of a library's handler of SIGTERM
            number = signal.SIGTERM
        if number is None:
            complain(lost)
        else:  # not here, where it would be dropped as well
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)).start()

    with handlers_kept():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _interrupt)
        sys.unraisablehook = send_again
        try:
            yield
        finally:
            sys.unraisablehook = complain


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """For a `with` block after which the signals are handled as before it: Ray sets handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """For the end of a process that has nothing left to clean up: what it says and its exit code are settled."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, _: FrameType | None) -> None:
    _received.append(number)
    if len(_received) > _PATIENT_SIGNALS:
        os._exit(exit_code())
    raise KeyboardInterrupt
