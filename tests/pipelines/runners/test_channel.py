from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path

import pytest

from pipelines.runners.channel import Channel, FileChannel, QueueChannel

KINDS = pytest.mark.parametrize("kind", [FileChannel, QueueChannel])


@KINDS
def test_what_processes_tell_is_heard_until_the_end(local_ray, kind):
    """In the order of each; Ray's queue may take what comes at the same time in another one."""
    import ray

    channel: Channel = kind()

    @ray.remote(num_cpus=0.5)
    def tell(who: int) -> None:
        for number in range(20):
            channel.put((who, number, "x" * 10_000))
        channel.flush()

    ended = threading.Thread(
        target=lambda: (ray.get([tell.remote(who) for who in range(3)]), channel.close())
    )
    ended.start()
    heard = []
    while (item := channel.get()) is not None:
        heard.append(item)
    ended.join()
    channel.remove()
    assert sorted(heard) == [(who, number, "x" * 10_000) for who in range(3) for number in range(20)]
    if kind is FileChannel:
        for who in range(3):
            of_one = [item for item in heard if item[0] == who]
            assert of_one == sorted(of_one)


def test_an_item_is_waited_for_and_heard_at_once():
    channel = FileChannel()
    threading.Timer(0.5, pickle.loads(pickle.dumps(channel)).put, ["late"]).start()
    begin = time.monotonic()
    assert channel.get() == "late"
    assert time.monotonic() - begin > 0.4
    channel.remove()


def test_an_item_that_is_cut_off_costs_no_other_one():
    """As where a disk is full for a moment."""
    channel = FileChannel()
    channel.put(1)
    whole = Path(channel.path).read_bytes()
    for length in range(1, len(whole)):
        with open(channel.path, "ab") as file:
            file.write(whole[:length])
        channel.put(length + 1)
    channel.close()
    heard = []
    while (item := channel.get()) is not None:
        heard.append(item)
    # One that lacks no more than its newline is whole.
    assert heard == [*range(1, len(whole)), 1, len(whole)]
    channel.remove()


def test_who_tells_a_channel_that_is_gone_is_told_so():
    channel = FileChannel()
    channel.remove()
    with pytest.raises(FileNotFoundError):
        channel.put(1)
