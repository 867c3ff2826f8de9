"""A bar that moves within blocks. (With Ray: test_actors.py.)"""

from __future__ import annotations

import io
import re

import pytest
from tqdm import tqdm

from pipelines.runners.channel import FileChannel
from pipelines.runners.progress import PoolProgress, teller


def test_units_count_once_whoever_tells_them_how_often() -> None:
    """Of 20 units 2 were done before; a is finished, b begun anew after its actor has died, c under way."""
    channel = FileChannel()
    with tqdm(total=20, initial=2, file=io.StringIO()) as bar:
        progress = PoolProgress(bar)
        for block, units in [("a", 2), ("b", 4), ("b", 1), ("c", 3)]:
            teller(channel, block)(units)
        progress.finish("a", 5)
        assert bar.n == 2 + 5
        channel.close()
        progress._listen(channel)
        assert bar.n == 2 + 5 + 1 + 3
        assert re.search(r"11/20 \[\d\d:\d\d<\d\d:\d\d", str(bar))
    channel.remove()


def test_a_worker_to_whom_nobody_listens_works_on() -> None:
    channel = FileChannel()
    channel.remove()
    with pytest.raises(OSError):
        channel.put(("a", 1))
    done = []
    for unit in (1, 2):
        teller(channel, "a")(unit)
        done.append(unit)
    assert done == [1, 2]
