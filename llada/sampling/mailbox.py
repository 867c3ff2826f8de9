"""The way back from the engine's thread to one coroutine."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from llada.sampling.events import Event, Text

Letter = Event | BaseException


class Mailbox:
    """Any thread puts, the coroutine that made the mailbox gets."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_filled = asyncio.Event()
        self._letters: deque[Letter] = deque()

    def put(self, letter: Letter) -> None:
        self._letters.append(letter)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._is_filled.set)

    async def get(self) -> list[Letter]:
        """Everything that has arrived, at least one; texts of a request that pile up are joined, for readers slower
        than us."""
        await self._is_filled.wait()
        self._is_filled.clear()
        arrived: list[Letter] = []
        while self._letters:
            letter = self._letters.popleft()
            last = arrived[-1] if arrived else None
            if isinstance(letter, Text) and isinstance(last, Text) and letter.index == last.index:
                canvas = last.canvas if letter.canvas is None else letter.canvas
                arrived[-1] = Text(letter.index, last.text + letter.text, canvas)
            else:
                arrived.append(letter)
        return arrived
