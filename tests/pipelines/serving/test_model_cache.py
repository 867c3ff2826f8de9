"""Which models are in memory, over real engines: in which order they go, and that none goes while it is used."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from llada.errors import UserError
from llada.sampling.config import SamplingConfig
from llada.sampling.events import Finished, Text
from pipelines.serving.dialects.completions import CompletionBody
from pipelines.serving.model_cache import ModelCache
from pipelines.serving.replica import Denoiser

ASKED = {"prompt": [7, 7], "max_tokens": 2, "temperature": 1.0, "seed": 3, "ignore_eos": True}


class Shelf:
    """A cache of engines of one checkpoint under several names."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = str(folder)
        self.loads: list[str] = []
        self.engines: list[weakref.ref[Denoiser]] = []
        self.bad: set[str] = set()
        self.told: list[list[str]] = []
        self.cache = ModelCache(
            most, self._prepare, self._load, Denoiser.close, lambda names: self.told.append([*names])
        )

    def _prepare(self, name: str) -> None:
        if name in self.bad:
            raise UserError(f"{name} is damaged")

    def _load(self, name: str) -> Denoiser:
        self.loads.append(name)
        denoiser = Denoiser(self._folder, SamplingConfig(gen_length=8, block_length=8), is_alone=False)
        self.engines.append(weakref.ref(denoiser))
        return denoiser

    async def ask(self, name: str, **fields: object) -> str:
        """The text of a reply."""
        denoiser = await self.cache.take(name)
        try:
            body = CompletionBody.model_validate({**ASKED, **fields})
            events = [event async for event in denoiser.stream(body)]
        finally:
            del denoiser
            self.cache.give_back(name)
        assert isinstance(events[-1], Finished)
        return "".join(event.text for event in events if isinstance(event, Text))


def run(folder: Path, most: int, play: Callable[[Shelf], Awaitable[None]]) -> Shelf:
    shelf = Shelf(folder, most)

    async def begin() -> None:
        await play(shelf)
        assert shelf.cache.num_waiting == 0

    asyncio.run(asyncio.wait_for(begin(), 120))
    for denoiser in shelf.cache.models:
        denoiser.close()
    return shelf


async def begun(shelf: Shelf) -> None:
    """Until the first engine denoises."""
    while not shelf.engines or not (there := shelf.engines[0]()) or not there.engine.num_running:
        await asyncio.sleep(0.001)


def test_the_one_that_was_asked_for_longest_ago_goes_and_leaves_nothing(small_model: Path) -> None:
    async def play(shelf: Shelf) -> None:
        texts = [await shelf.ask(name) for name in ("a", "b", "a", "c", "b")]
        assert len(set(texts)) == 1  # of one checkpoint and seed
        assert shelf.cache.names == ["c", "b"]
        assert [engine() is None for engine in shelf.engines] == [True, True, False, False]

    shelf = run(small_model, 2, play)
    assert shelf.loads == ["a", "b", "c", "b"]
    assert shelf.told == [["a"], ["a", "b"], ["a"], ["a", "c"], ["c"], ["c", "b"]]


def test_none_goes_while_it_is_used_and_then_those_who_wait_come_first(small_model: Path) -> None:
    """One place. `b` waits for the reply of `a`; who asks for `a` behind it waits for `b`, so that it is not put off for ever."""

    async def play(shelf: Shelf) -> None:
        alone = await shelf.ask("a", max_tokens=100)
        long = asyncio.create_task(shelf.ask("a", max_tokens=100))
        await begun(shelf)
        other = asyncio.create_task(shelf.ask("b"))
        while not shelf.cache._held["a"].is_leaving:
            await asyncio.sleep(0.001)
        behind = [asyncio.create_task(shelf.ask("a", seed=seed)) for seed in range(3)]
        await asyncio.sleep(0)
        assert shelf.cache.num_waiting == 4
        assert await long == alone
        assert shelf.loads == ["a"]
        await other
        await asyncio.gather(*behind)

    assert run(small_model, 1, play).loads == ["a", "b", "a"]


def test_who_leaves_the_queue_for_room_sends_nothing_away(small_model: Path) -> None:
    """One place, in use for a long reply. `b` does not wait for its end, and then it is as if it had never come."""

    async def play(shelf: Shelf) -> None:
        long = asyncio.create_task(shelf.ask("a", max_tokens=1900))
        await begun(shelf)
        other = asyncio.create_task(shelf.ask("b"))
        while not shelf.cache._held["a"].is_leaving:
            await asyncio.sleep(0.001)
        behind = asyncio.create_task(shelf.ask("a"))
        await asyncio.sleep(0)
        other.cancel()
        await behind
        assert not long.done()
        await shelf.ask("a")
        long.cancel()

    assert run(small_model, 1, play).loads == ["a"]


def test_of_those_that_are_idle_the_oldest_goes_before_one_that_is_used(small_model: Path) -> None:
    async def play(shelf: Shelf) -> None:
        long = asyncio.create_task(shelf.ask("a", max_tokens=1900))
        await begun(shelf)
        await shelf.ask("b")
        await shelf.ask("c")
        assert shelf.cache.names == ["a", "c"]
        assert not long.done()
        await shelf.ask("a")  # it was never to leave
        long.cancel()

    assert run(small_model, 2, play).loads == ["a", "b", "c"]


def test_who_leaves_while_it_is_loaded_holds_nothing(small_model: Path) -> None:
    """Nor is a model loaded that nobody waits for any more."""

    async def play(shelf: Shelf) -> None:
        first = asyncio.create_task(shelf.ask("a"))
        while not shelf.loads:
            await asyncio.sleep(0.001)
        unwanted = asyncio.create_task(shelf.ask("x"))
        await asyncio.sleep(0)
        for task in (first, unwanted):
            task.cancel()
        await shelf.ask("b")
        assert shelf.cache.names == ["b"]

    assert run(small_model, 1, play).loads == ["a", "b"]


def test_one_that_cannot_be_loaded_costs_no_other_its_place(small_model: Path) -> None:
    async def play(shelf: Shelf) -> None:
        await shelf.ask("a")
        shelf.bad.add("b")
        answers = await asyncio.gather(*(shelf.ask(name) for name in "bab"), return_exceptions=True)
        assert [isinstance(answer, UserError) for answer in answers] == [True, False, True]
        assert shelf.cache.names == ["a"]
        shelf.bad.clear()
        await shelf.ask("b")

    assert run(small_model, 1, play).loads == ["a", "b"]


def test_a_crowd_for_two_models_and_one_place_is_served(small_model: Path) -> None:
    """Each load serves all who wait for it: there are far fewer of them than requests."""

    async def play(shelf: Shelf) -> None:
        await asyncio.gather(*(shelf.ask("ab"[number % 2], seed=number) for number in range(24)))

    loads = run(small_model, 1, play).loads
    assert 2 <= len(loads) <= 4


@pytest.mark.parametrize("name", ["a", "b"])
def test_what_was_loaded_elsewhere_is_held_like_others(small_model: Path, name: str) -> None:
    async def play(shelf: Shelf) -> None:
        shelf.cache.put("a", shelf._load("a"))
        await shelf.ask(name)
        assert shelf.cache.names == [name]

    assert run(small_model, 1, play).loads == ["a", name][: 1 + (name == "b")]
