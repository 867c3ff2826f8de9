"""The way back from the engine's thread to one coroutine."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Iterable

from llada.sampling.events import Draft, Event, Text

Letter = Event | BaseException


class Mailbox:
    """Any thread puts and then wakes (`wake`), the coroutine that made the mailbox gets.

    It holds no more than a text, a draft, a beginning and an end of each request, however slow the reader is: a text that
    finds one unread is joined to it, a draft takes its place.
    """

    def __init__(self, pace_s: float = 0.0) -> None:
        """`pace_s`: for nothing but more text, the reader is not to be woken so soon again."""
        self._loop = asyncio.get_running_loop()
        self._is_filled = asyncio.Event()
        self._lock = threading.Lock()
        self._letters: list[Letter] = []
        self._unread: dict[tuple[type, int], int] = {}  # {Text or Draft, of which request: where it lies}
        self._pace_s = pace_s
        self._woken_at = -math.inf
        self._is_urgent = self._has_text = False

    def put(self, letter: Letter) -> None:
        with self._lock:
            self._is_urgent |= not (isinstance(letter, Text) and self._has_text)
            self._has_text |= isinstance(letter, Text)
            if not isinstance(letter, Text | Draft):
                self._letters.append(letter)
                return
            at = self._unread.setdefault((type(letter), letter.index), len(self._letters))
            if at == len(self._letters):
                self._letters.append(letter)
                return
            if isinstance(before := self._letters[at], Text) and isinstance(letter, Text):
                text, tokens = before.text + letter.text, before.tokens + letter.tokens
                letter = Text(letter.index, text, tokens, letter.completion_tokens)
            self._letters[at] = letter

    async def get(self) -> list[Letter]:
        """Everything that has arrived, at least one; of each request in order."""
        while True:
            await self._is_filled.wait()
            self._is_filled.clear()
            with self._lock:
                arrived, self._letters = self._letters, []
                self._unread.clear()
            if arrived:  # or they were read before the wake-up for them came
                return arrived

    def is_due(self) -> bool:
        """Whether what was put is to be told now. If not, text is all that there is: somebody is to ask again."""
        return self._is_urgent or time.monotonic() >= self._woken_at + self._pace_s

    @staticmethod
    def wake(mailboxes: Iterable[Mailbox]) -> None:
        """Tell the readers that there is something to get; one call for all of a loop, as each interrupts its thread."""
        by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        for mailbox in mailboxes:
            mailbox._woken_at, mailbox._is_urgent = time.monotonic(), False
            by_loop.setdefault(mailbox._loop, []).append(mailbox._is_filled)
        for loop, events in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
