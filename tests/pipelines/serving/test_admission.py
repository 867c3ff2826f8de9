"""Places, and the time after which a refused client should come again, by a clock of our own."""

from __future__ import annotations

import pytest

from pipelines.serving.admission import Admission
from pipelines.serving.errors import RequestError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_there_are_places_for_those_who_are_served_and_those_who_wait() -> None:
    admission = Admission(max_queued=2, per_replica=3, retry_after_s=5)
    first = [admission.enter(8) for _ in range(2)]  # no replica runs: they wait for it
    with pytest.raises(RequestError) as caught:
        admission.enter(8)
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (429, "queue_full", 5)
    admission.num_replicas = 2
    more = [admission.enter(8) for _ in range(6)]  # in a burst, before any has said that it is served
    with pytest.raises(RequestError):
        admission.enter(8)
    first[0].leave(is_done=False)
    more.append(admission.enter(8))
    with pytest.raises(RequestError):
        admission.enter(8)
    for place in [*first[1:], *more]:
        place.leave(is_done=True)
    assert len([admission.enter(1) for _ in range(8)]) == 8


def test_any_number_may_wait_where_it_is_said() -> None:
    admission = Admission(max_queued=-1, per_replica=1, retry_after_s=5)
    assert len([admission.enter(1) for _ in range(1000)]) == 1000


def test_a_refused_client_comes_again_when_the_queue_has_been_begun() -> None:
    clock = Clock()
    admission = Admission(max_queued=3, per_replica=2, retry_after_s=5, clock=clock)
    admission.num_replicas = 1
    for _ in range(5):  # 100 tokens in each 2 s
        place = admission.enter(100)
        place.waits = False
        clock.now += 2
        place.leave(is_done=True)
    assert admission.retry_after_s() == 5  # nobody waits
    for work in (1000, 1000):
        admission.enter(work).waits = False
    for work in (300, 50, 50):
        admission.enter(work)
    # 500 tokens since the first of them was done, 8 s ago.
    assert admission.retry_after_s() == 7  # 400 / (500 / 8) = 6.4
    clock.now += 61
    assert admission.retry_after_s() == 5  # nothing was done in the last minute: the speed is not known


def test_what_was_given_up_says_nothing_of_the_speed() -> None:
    clock = Clock()
    admission = Admission(max_queued=3, per_replica=2, retry_after_s=5, clock=clock)
    for _ in range(3):
        admission.enter(10_000).leave(is_done=False)
    admission.enter(10)
    assert admission.retry_after_s() == 5


def test_nobody_is_sent_away_for_an_hour() -> None:
    clock = Clock()
    admission = Admission(max_queued=9, per_replica=2, retry_after_s=5, clock=clock)
    for _ in range(2):
        place = admission.enter(1)
        clock.now += 20
        place.leave(is_done=True)
    admission.enter(1e9)
    assert admission.retry_after_s() == 600
