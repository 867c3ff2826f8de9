"""A step that hangs is found, and nothing else is taken for one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from llada.files import with_retries
from llada.training import watch as watch_module
from llada.training.watch import Hang, HangWatch

FOUND_S = 120.0


class Clock:
    """What a watch goes by, as far as it is set: no work of others makes a step longer."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch_module, "time", clock)
    return clock


class Alarm:
    """What a watch has told."""

    def __init__(self) -> None:
        self.hangs: list[Hang] = []
        self.told = threading.Event()

    def __call__(self, hang: Hang) -> None:
        self.hangs.append(hang)
        self.told.set()


def steps(watch: HangWatch, number: int, clock: Clock, phase: str = "step", seconds: float = 0.001) -> None:
    for _ in range(number):
        watch.enter(phase)
        clock.now += seconds


def test_a_step_that_does_not_end_is_told_with_where_each_thread_is(clock: Clock):
    alarm = Alarm()
    watch = HangWatch(alarm, floor_s=0.05)
    leave, in_step = threading.Event(), threading.Event()

    def work() -> None:
        steps(watch, 20, clock)
        watch.enter("step")
        in_step.set()
        leave.wait()

    thread = threading.Thread(target=work, name="training")
    thread.start()
    assert in_step.wait(FOUND_S)
    clock.now += 0.06
    assert alarm.told.wait(FOUND_S)
    leave.set()
    thread.join()
    (hang,) = alarm.hangs
    assert (hang.phase, hang.seconds) == ("step", pytest.approx(0.06))
    assert "Thread training:" in hang.stacks
    assert "leave.wait()" in hang.stacks


def tells(
    clock: Clock,
    work: Callable[[HangWatch], None],
    seconds: float,
    *,
    floor_s: float = 0.02,
    patience_s: float = 0.1,
) -> bool:
    """Whether an alarm is given when the last phase of `work` takes so long; the watch looks up every tenth of its floor."""
    alarm = Alarm()
    watch = HangWatch(alarm, floor_s=floor_s)
    work(watch)
    clock.now += seconds
    found = alarm.told.wait(patience_s)
    watch.close()
    return found


def test_the_first_steps_validations_and_checkpoints_may_take_as_long_as_they_do(clock: Clock):
    assert not tells(clock, lambda watch: steps(watch, 2, clock), seconds=1000)

    def work(watch: HangWatch) -> None:
        steps(watch, 20, clock)
        watch.enter("validation")
        clock.now += 1000
        time.sleep(0.1)
        steps(watch, 3, clock)
        watch.enter("checkpoint")

    assert not tells(clock, work, seconds=1000)


def test_ten_times_the_usual_and_the_floor_must_both_be_passed(clock: Clock):
    def slow(watch: HangWatch) -> None:
        steps(watch, 4, clock, seconds=0.04)

    def fast(watch: HangWatch) -> None:
        steps(watch, 20, clock)

    # Behind the last of them, which is the usual 0.04 s long by then: 0.34 s are no ten times of it.
    assert not tells(clock, slow, seconds=0.3)
    assert tells(clock, slow, seconds=0.4, patience_s=FOUND_S)
    assert not tells(clock, fast, seconds=0.9, floor_s=1, patience_s=0.3)
    assert tells(clock, fast, seconds=1.1, floor_s=1, patience_s=FOUND_S)


def test_where_most_steps_return_at_once_the_mean_counts(clock: Clock):
    watch = HangWatch(Alarm(), floor_s=0.001)
    for _ in range(4):
        steps(watch, 4, clock, seconds=0)
        steps(watch, 1, clock, seconds=0.05)
    watch.enter("step")
    assert watch.limit_s("step") == pytest.approx(10 * 0.05 / 5)
    watch.close()


def test_a_compilation_is_no_hang(clock: Clock):
    alarm = Alarm()
    watch = HangWatch(alarm, floor_s=0.02)
    in_compiler, leave = threading.Event(), threading.Event()

    def backend(graph, inputs):
        in_compiler.set()
        leave.wait(FOUND_S)
        return graph.forward

    thread = threading.Thread(target=lambda: torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2)))
    thread.start()
    assert in_compiler.wait(FOUND_S)
    steps(watch, 20, clock)
    watch.enter("step")
    clock.now += 1
    time.sleep(0.2)
    compiling = list(alarm.hangs)
    leave.set()
    thread.join()
    assert compiling == []
    assert alarm.told.wait(FOUND_S)  # and behind it one is found as before


def test_who_waits_for_a_store_hangs_no_sooner_than_the_store_may_be_away(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    """Rows that are read again and again keep the others, who have theirs, waiting in their step; so does the checkpoint before
    behind which the next one, or the end of a worker that is asked to leave, waits."""
    alarm = Alarm()
    watch = HangWatch(alarm, floor_s=0.02)
    is_asking, answer = threading.Event(), threading.Event()

    def ask() -> None:
        is_asking.set()
        answer.wait(FOUND_S)

    thread = threading.Thread(target=lambda: with_retries(ask, "memory://rows"))
    thread.start()
    assert is_asking.wait(FOUND_S)
    steps(watch, 20, clock)
    watch.enter("step")
    clock.now += 1
    time.sleep(0.2)
    waiting = list(alarm.hangs)
    answer.set()
    thread.join()
    assert waiting == []
    assert alarm.told.wait(FOUND_S)

    monkeypatch.setattr(watch_module, "STORE_S", 0.2)
    for phase, is_long in (("checkpoint", True), ("validation", False)):
        each = HangWatch(Alarm(), floor_s=0.02)
        steps(each, 5, clock, phase)
        limit = each.limit_s(phase)
        assert limit is not None
        assert (limit >= 0.2) == is_long
        each.close()
