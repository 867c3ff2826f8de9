"""Leaving together: whoever is asked, all leave at the same step. (With the loop: test_trainer.py.)"""

from __future__ import annotations

from llada.training.preemption import Departure


def test_one_worker_leaves_when_it_is_asked_and_nobody_without_a_question():
    answers = iter([False, False, True])
    departure = Departure(lambda: next(answers))
    assert [departure.agreed() for _ in range(3)] == [False, False, True]
    assert not Departure(None).agreed()
