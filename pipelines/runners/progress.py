"""How far the blocks of an actor pool are, on a progress bar while they are worked on: one may take an hour."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from pipelines.runners.channel import Channel, FileChannel, QueueChannel
from pipelines.stage.own_ray import is_own_ray

Told = Callable[[int], None]
"""Called by the worker of a block with the units of it that are done so far."""


class PoolProgress:
    """The driver's end."""

    def __init__(self, bar: tqdm[Any]) -> None:
        """`bar` is at what was done before."""
        self._bar, self._before = bar, bar.n
        self._told: dict[str, int] = {}  # of blocks that are worked on: one that is begun anew begins at 0
        self._finished: dict[str, int] = {}
        self._drawing = threading.Lock()

    def finish(self, block: str, units: int) -> None:
        """All of its units are done."""
        with self._drawing:
            self._finished[block] = units
            self._draw()

    @contextlib.contextmanager
    def listening(self) -> Iterator[Channel]:
        """For a `with` block, with Ray connected to, the bar moves as workers tell the channel."""
        from ray.exceptions import RayError

        channel = FileChannel() if is_own_ray() else QueueChannel()
        listener = threading.Thread(target=self._listen, args=(channel,), daemon=True)
        listener.start()
        try:
            yield channel
        finally:
            with contextlib.suppress(RayError):
                channel.close()
                listener.join()
                channel.remove()

    def _listen(self, channel: Channel) -> None:
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):  # what stands between has died: the bar moves by blocks
            while (item := channel.get()) is not None:
                with self._drawing:
                    self._told |= [item]
                    self._draw()

    def _draw(self) -> None:
        done = self._before + sum((self._told | self._finished).values())
        self._bar.update(done - self._bar.n)


def teller(channel: Channel, block: str) -> Told:
    """For the worker of a block."""
    from ray.exceptions import RayError

    def tell(units: int) -> None:
        with contextlib.suppress(OSError, RayError):  # nobody listens any more
            channel.put((block, units))

    return tell
