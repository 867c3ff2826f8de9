"""From a thread to a coroutine: nothing is lost, order is kept, and slow readers get joined texts."""

from __future__ import annotations

import asyncio
import threading

from llada.sampling.events import Draft, Event, Finished, Started, Text, Token
from llada.sampling.mailbox import Mailbox


def token(number: int) -> Token:
    return Token(number, b"x", 0, number, -0.5)


def draft(index: int, forwards: int) -> Draft:
    return Draft(index, forwards, (0, 1), ("x",), (0,), (0.5,))


def test_texts_that_pile_up_are_joined_and_the_rest_keeps_its_order() -> None:
    async def read() -> list[object]:
        box = Mailbox()
        end = Finished(0, "length", 1, 2, 3)
        for letter in (
            Started(0),
            Text(0, "a", (token(1),)),
            draft(0, 1),
            Text(0, "b"),
            Text(1, "y"),
            draft(1, 1),
            draft(0, 2),
            Text(0, "c", (token(2), token(3))),
            end,
        ):
            box.put(letter)
        Mailbox.wake([box])
        return list(await box.get())

    assert asyncio.run(read()) == [
        Started(0),
        Text(0, "abc", (token(1), token(2), token(3))),
        draft(0, 2),
        Text(1, "y"),
        draft(1, 1),
        Finished(0, "length", 1, 2, 3),
    ]


def test_what_is_not_read_takes_no_more_room() -> None:
    async def read() -> tuple[list[Text], list[Draft]]:
        box = Mailbox()
        for number in range(999):
            box.put(Text(number % 3, str(number % 10)))
            box.put(draft(number % 3, number))
            assert len(box._letters) <= 6
        Mailbox.wake([box])
        letters = await box.get()
        drafts = [letter for letter in letters if isinstance(letter, Draft)]
        return [letter for letter in letters if isinstance(letter, Text)], drafts

    texts, drafts = asyncio.run(read())
    assert [draft.forwards for draft in drafts] == [996, 997, 998]
    assert [len(text.text) for text in texts] == [333] * 3


def test_another_thread_can_put_while_the_reader_waits() -> None:
    async def read() -> str:
        box = Mailbox()
        texts = [Text(0, str(number % 10)) for number in range(2000)]
        letters: list[Event] = [*texts, Finished(0, "length", 0, 0, 0)]

        def put_all() -> None:
            for letter in letters:
                box.put(letter)
                Mailbox.wake([box])

        thread = threading.Thread(target=put_all)
        thread.start()
        text = ""
        while True:
            for letter in await asyncio.wait_for(box.get(), 60):
                if isinstance(letter, Finished):
                    thread.join()
                    return text
                assert isinstance(letter, Text)
                text += letter.text

    assert asyncio.run(read()) == "0123456789" * 200


def test_a_reader_who_has_gone_is_no_error() -> None:
    async def make() -> Mailbox:
        return Mailbox()

    box = asyncio.run(make())
    assert box._loop.is_closed()
    box.put(Started(0))
    Mailbox.wake([box])


def test_one_wake_up_serves_the_readers_of_several_loops() -> None:
    """And one for whom nothing is there any more goes on waiting."""
    boxes: list[Mailbox] = []
    got: list[list[object]] = []
    ready = threading.Semaphore(0)

    async def read() -> None:
        own = [Mailbox(), Mailbox()]
        boxes.extend(own)
        ready.release()
        got.extend([list(await asyncio.wait_for(box.get(), 60)) for box in own])

    threads = [threading.Thread(target=asyncio.run, args=(read(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
        ready.acquire()
    Mailbox.wake(boxes)  # of nothing
    for box in boxes:
        box.put(Started(0))
    Mailbox.wake(boxes)
    for thread in threads:
        thread.join(60)
    assert got == [[Started(0)]] * 4


def test_nothing_but_more_text_waits_for_its_pace() -> None:
    async def told() -> list[bool]:
        box, found = Mailbox(pace_s=3600.0), []
        for letter in (Started(0), Text(0, "a"), Text(0, "b"), Text(1, "c"), draft(0, 1), Text(0, "d")):
            box.put(letter)
            found.append(box.is_due())
            if found[-1]:
                Mailbox.wake([box])
        assert not box.is_due()
        box.put(Finished(0, "length", 1, 2, 3))
        return [*found, box.is_due()]

    assert asyncio.run(told()) == [True, True, False, False, True, False, True]


def test_without_a_pace_all_is_told_at_once() -> None:
    async def told() -> bool:
        box = Mailbox()
        for letter in (Text(0, "a"), Text(0, "b")):
            box.put(letter)
            Mailbox.wake([box])
        box.put(Text(0, "c"))
        return box.is_due()

    assert asyncio.run(told())
