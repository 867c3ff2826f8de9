"""Several models in one process, of which no more than so many are in memory: the one that was asked for longest ago goes.

One event loop's. A model that a request uses stays until the request is over; who asks for one that is not there waits until it
is loaded, and, where all that are there are in use, until one is not. Loading goes on in a thread, one model after the other
in the order in which they were asked for. Whoever waits for it may leave, and what nobody waits for is not loaded.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Held = TypeVar("Held")


@dataclass
class _Place(Generic[Held]):
    model: Held
    users: int = 0
    is_leaving: bool = False
    """Others wait for it to be free: no request begins with it any more."""


class ModelCache(Generic[Held]):
    """At most `most` models by their names."""

    def __init__(
        self,
        most: int,
        prepare: Callable[[str], None],
        load: Callable[[str], Held],
        close: Callable[[Held], None],
        on_change: Callable[[Sequence[str]], None],
    ) -> None:
        """
        Args:
            prepare: raises what shows without its memory that a model cannot be loaded; called in a thread, before another
                has to go for it.
            load, close: called in a thread. What is closed is then forgotten.
            on_change: told the names of those that are held.
        """
        self._most, self._prepare, self._load = most, prepare, load
        self._close, self._on_change = close, on_change
        self._held: OrderedDict[str, _Place[Held]] = OrderedDict()  # the one asked for longest ago first
        self._waiting: dict[str, list[asyncio.Future[Held]]] = {}
        self._loads: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()
        self._freed = asyncio.Event()

    @property
    def models(self) -> list[Held]:
        """Those that are held, the one asked for longest ago first."""
        return [place.model for place in list(self._held.values())]

    @property
    def names(self) -> list[str]:
        """Theirs."""
        return [*self._held]

    @property
    def num_waiting(self) -> int:
        """Requests whose model is not there yet."""
        return sum(not ready.done() for waiting in self._waiting.values() for ready in waiting)

    def put(self, name: str, model: Held) -> None:
        """Hold a model that was loaded elsewhere. There must be a place for it."""
        self._held[name] = _Place(model)
        self._on_change([*self._held])

    async def take(self, name: str) -> Held:
        """The model, which stays until it is given back as often as it was taken. Raises what loading it raises."""
        place = self._held.get(name)
        if place is not None and not place.is_leaving:
            self._held.move_to_end(name)
            place.users += 1
            return place.model
        ready: asyncio.Future[Held] = asyncio.get_running_loop().create_future()
        is_first = name not in self._waiting
        self._waiting.setdefault(name, []).append(ready)
        if is_first:
            task = asyncio.create_task(self._bring(name))
            self._loads.add(task)
            task.add_done_callback(self._loads.discard)
        try:
            return await ready
        except asyncio.CancelledError:
            if ready.done() and not ready.cancelled() and ready.exception() is None:
                self.give_back(name)
            self._freed.set()  # no room may be wanted any more
            raise

    def give_back(self, name: str) -> None:
        """The request that has taken the model is over."""
        place = self._held[name]
        place.users -= 1
        if not place.users:
            self._freed.set()

    async def _bring(self, name: str) -> None:
        """Load the model for all who wait for it, however many of them are left."""
        failure: Exception | None = None
        async with self._one_at_a_time:
            try:
                # It may be held: it was to leave, and has not had to.
                if self._is_wanted(name) and name not in self._held:
                    await asyncio.to_thread(self._prepare, name)
                    if await self._make_room(name):
                        self._held[name] = _Place(await asyncio.to_thread(self._load, name))
                        self._on_change([*self._held])
            except Exception as error:
                failure = error
            # Theirs before another's turn, who would find it unused.
            waiting = [ready for ready in self._waiting.pop(name) if not ready.done()]
            for ready in waiting:
                if failure is None:
                    ready.set_result(self._held[name].model)
                else:
                    ready.set_exception(failure)
            if waiting and failure is None:
                self._held.move_to_end(name)
                self._held[name].users += len(waiting)

    def _is_wanted(self, name: str) -> bool:
        return any(not ready.done() for ready in self._waiting[name])

    async def _make_room(self, wanted: str) -> bool:
        """Let go of models, those asked for longest ago first, until there is room for one; False as soon as nobody waits for
        `wanted`. Where all are in use the first of them takes no new requests, so that it will be free however many come."""
        try:
            while self._is_wanted(wanted):
                if len(self._held) < self._most:
                    return True
                name = next((name for name, place in self._held.items() if not place.users), None)
                if name is not None:
                    await self._let_go(name)
                    continue
                next(iter(self._held.values())).is_leaving = True
                self._freed.clear()
                await self._freed.wait()
            return False
        finally:
            for place in self._held.values():
                place.is_leaving = False

    async def _let_go(self, name: str) -> None:
        model = self._held.pop(name).model
        self._on_change([*self._held])
        await asyncio.to_thread(self._close, model)
