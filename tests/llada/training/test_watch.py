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

FOUND_S = 30.0


class Alarm:
    """What a watch has told."""

    def __init__(self) -> None:
        self.hangs: list[Hang] = []
        self.told = threading.Event()

    def __call__(self, hang: Hang) -> None:
        self.hangs.append(hang)
        self.told.set()


def steps(watch: HangWatch, number: int, phase: str = "step", seconds: float = 0.001) -> None:
    for _ in range(number):
        watch.enter(phase)
        time.sleep(seconds)


def test_a_step_that_does_not_end_is_told_with_where_each_thread_is():
    alarm = Alarm()
    watch = HangWatch(alarm, floor_s=0.05)
    leave = threading.Event()

    def work() -> None:
        steps(watch, 20)
        leave.wait()

    thread = threading.Thread(target=work, name="training")
    thread.start()
    assert alarm.told.wait(FOUND_S)
    leave.set()
    thread.join()
    (hang,) = alarm.hangs
    assert (hang.phase, hang.seconds >= 0.05) == ("step", True)
    assert "Thread training:" in hang.stacks
    assert "leave.wait()" in hang.stacks


def quiet(work: Callable[[HangWatch], None], floor_s: float = 0.02) -> bool:
    """Whether no alarm is given in a tenth of a second behind `work`."""
    alarm = Alarm()
    watch = HangWatch(alarm, floor_s=floor_s)
    work(watch)
    time.sleep(0.1)
    watch.close()
    return not alarm.hangs


def test_the_first_steps_validations_and_checkpoints_may_take_as_long_as_they_do():
    def work(watch: HangWatch) -> None:
        steps(watch, 2, seconds=0.05)  # not known yet
        steps(watch, 20)
        watch.enter("validation")
        time.sleep(0.1)
        steps(watch, 3)
        watch.enter("checkpoint")

    assert quiet(work)


def test_ten_times_the_usual_and_the_floor_must_both_be_passed():
    def slow(watch: HangWatch) -> None:
        steps(watch, 4, seconds=0.04)  # 0.1 s are no ten times of it

    assert quiet(slow)
    assert quiet(lambda watch: steps(watch, 20), floor_s=60)


def test_where_most_steps_return_at_once_the_mean_counts():
    watch = HangWatch(Alarm(), floor_s=0.001)
    for _ in range(4):
        steps(watch, 4, seconds=0)
        steps(watch, 1, seconds=0.05)
    watch.enter("step")
    limit = watch.limit_s("step")
    assert limit is not None
    assert limit >= 10 * 0.05 / 5
    watch.close()


def test_a_compilation_is_no_hang():
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
    steps(watch, 20)
    watch.enter("step")
    time.sleep(0.2)
    compiling = list(alarm.hangs)
    leave.set()
    thread.join()
    assert compiling == []
    assert alarm.told.wait(FOUND_S)  # and behind it one is found as before


def test_who_waits_for_a_store_hangs_no_sooner_than_the_store_may_be_away(monkeypatch: pytest.MonkeyPatch):
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
    steps(watch, 20)
    watch.enter("step")
    time.sleep(0.2)
    waiting = list(alarm.hangs)
    answer.set()
    thread.join()
    assert waiting == []
    assert alarm.told.wait(FOUND_S)

    monkeypatch.setattr(watch_module, "STORE_S", 0.2)
    for phase, is_long in (("checkpoint", True), ("validation", False)):
        each = HangWatch(Alarm(), floor_s=0.02)
        steps(each, 5, phase)
        limit = each.limit_s(phase)
        assert limit is not None
        assert (limit >= 0.2) == is_long
        each.close()
