"""The way back from the engine's thread to one coroutine."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from llada.sampling.events import Event, Text

Letter = Event | BaseException


class Mailbox:
    """Any thread puts, the coroutine that made the mailbox gets.

    It holds no more than a text, a beginning and an end of each request, however slow the reader is: a text that finds one
    unread is joined to it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_filled = asyncio.Event()
        self._lock = threading.Lock()
        self._letters: list[Letter] = []
        self._unread: dict[int, int] = {}  # {request: where its text lies}

    def put(self, letter: Letter) -> None:
        with self._lock:
            is_first = not self._letters
            if not isinstance(letter, Text):
                self._letters.append(letter)
            elif (at := self._unread.get(letter.index)) is None:
                self._unread[letter.index] = len(self._letters)
                self._letters.append(letter)
            else:
                before = self._letters[at]
                assert isinstance(before, Text)
                canvas = before.canvas if letter.canvas is None else letter.canvas
                self._letters[at] = Text(letter.index, before.text + letter.text, canvas)
        if is_first:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._is_filled.set)

    async def get(self) -> list[Letter]:
        """Everything that has arrived, at least one; of each request in order."""
        await self._is_filled.wait()
        self._is_filled.clear()
        with self._lock:
            arrived, self._letters = self._letters, []
            self._unread.clear()
        return arrived
