"""Finding a run that hangs: a thread that knows how long a step takes, and speaks up when one takes far longer."""

from __future__ import annotations

import statistics
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType

# A phase is known after so many of its kind; the first one compiles, and reads cold files.
KNOWN_AFTER = 3
REMEMBERED = 32
FACTOR = 10.0
# Files of torch in which a thread is only while it compiles, which takes as long as it takes.
_COMPILERS = ("torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py")
# So long a store may be away, or slow, before that is a hang too: for the phases that wait for one, and for any other while
# a thread of the process asks it again and again (rows are waited for so, which keeps the other workers waiting).
STORE_S = 3600.0
STORE_PHASES = frozenset({"checkpoint"})
_ASKING = ("llada/files.py", "with_retries")


@dataclass(frozen=True)
class Hang:
    """A phase that does not end."""

    phase: str
    seconds: float
    """So long by now."""
    usual_seconds: float
    stacks: str
    """Of all threads of the process."""


class HangWatch:
    """Calls `on_hang`, in a thread of its own, when a phase takes ten times as long as those of its kind have taken, and at
    least `floor_s`. One that is compiled in is left alone, and for STORE_S one that waits for a store.

    `enter` is told of each phase at its beginning; the one before ends with it.
    """

    def __init__(self, on_hang: Callable[[Hang], None], *, floor_s: float) -> None:
        self.on_hang, self.floor_s = on_hang, floor_s
        self._taken: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._now: tuple[str, float] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)

    def enter(self, phase: str) -> None:
        """A phase begins."""
        now = time.monotonic()
        if self._now is not None:
            before, since = self._now
            self._taken[before].append(now - since)
        self._now = (phase, now)
        if self._thread.ident is None:
            self._thread.start()

    def close(self) -> None:
        """Nothing is watched any more."""
        self._closed.set()

    def limit_s(self, phase: str) -> float | None:
        """How long a phase of this kind may take; None while that is not known."""
        taken = list(self._taken[phase])
        if len(taken) < KNOWN_AFTER:
            return None
        # Where a device works off a queue, most steps return at once and one waits for them all: the mean knows.
        limit = max(self.floor_s, FACTOR * max(statistics.median(taken), statistics.fmean(taken)))
        return max(limit, STORE_S) if phase in STORE_PHASES else limit

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.floor_s / 10)):
            phase, since = now = self._now or ("", 0.0)
            limit, seconds = self.limit_s(phase), time.monotonic() - since
            if limit is None or seconds < limit or _is_compiling() or now is not self._now:
                continue
            if seconds < STORE_S and _asks_a_store():
                continue
            self.on_hang(Hang(phase, seconds, statistics.median(self._taken[phase]), stacks_of_all_threads()))
            return


def stacks_of_all_threads() -> str:
    """Where each thread of this process is, as tracebacks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()
    )


def _is_compiling() -> bool:
    return any(code.co_filename.endswith(_COMPILERS) for code in _running())


def _asks_a_store() -> bool:
    file, function = _ASKING
    return any(code.co_name == function and code.co_filename.endswith(file) for code in _running())


def _running() -> Iterator[CodeType]:
    """What the threads of this process are in."""
    for frame in sys._current_frames().values():
        for each, _ in traceback.walk_stack(frame):
            yield each.f_code
