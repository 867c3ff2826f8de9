"""How many requests the gateway takes at a time, and when a refused client had better come again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from pipelines.serving.errors import RequestError

# Of what was finished lately, from which the speed is taken.
_WINDOW_S = 60.0
_LONGEST_WAIT_S = 600


class Admission:
    """Places for as many requests as the replicas work on at a time, and for those that may wait beside them.

    One event loop's. The replicas' number is known from the controller (`Replicas.look`), and a few seconds old.
    """

    def __init__(
        self,
        max_queued: int,
        per_replica: int,
        retry_after_s: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            max_queued: requests that may wait; -1: any number.
            per_replica: requests that a replica takes at a time.
            retry_after_s: for a client that is refused before it is known how fast the queue goes.
        """
        self.num_replicas = 0
        self._max_queued, self._per_replica, self._retry_after_s = max_queued, per_replica, retry_after_s
        self._clock = clock
        self._places: set[Place] = set()
        self._finished: deque[tuple[float, float]] = deque()
        self._finished_work = 0.0

    def enter(self, work: float) -> Place:
        """A place for a request of so much work, in tokens that it asks for. Raises RequestError 429 when all are taken."""
        most = self.num_replicas * self._per_replica + self._max_queued
        if self._max_queued >= 0 and len(self._places) >= most:
            raise RequestError(
                429,
                "too many requests are waiting; try again later",
                code="queue_full",
                retry_after_s=self.retry_after_s(),
            )
        place = Place(self, work)
        self._places.add(place)
        return place

    def retry_after_s(self) -> int:
        """Seconds until what waits now has been begun, at the speed of the last minute."""
        self._forget()
        waiting = sum(place.work for place in self._places if place.waits)
        if len(self._finished) < 2 or not waiting:
            return self._retry_after_s
        speed = self._finished_work / max(self._clock() - self._finished[0][0], 1e-3)
        return max(1, min(_LONGEST_WAIT_S, math.ceil(waiting / speed)))

    def _leave(self, place: Place, *, is_done: bool) -> None:
        self._places.discard(place)
        if is_done:
            self._finished.append((self._clock(), place.work))
            self._finished_work += place.work
            self._forget()

    def _forget(self) -> None:
        while self._finished and self._finished[0][0] < self._clock() - _WINDOW_S:
            self._finished_work -= self._finished.popleft()[1]


class Place:
    """One request's, from its coming to its end."""

    def __init__(self, admission: Admission, work: float) -> None:
        self._admission, self.work = admission, work
        self.waits = True
        """No replica has taken it yet."""

    def leave(self, *, is_done: bool) -> None:
        """`is_done`: it has been answered in full, and counts for the speed."""
        self._admission._leave(self, is_done=is_done)
