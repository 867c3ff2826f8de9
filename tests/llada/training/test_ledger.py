"""The book of a run's steps: the same whenever somebody looks, and what is due at skipped steps is not forgotten."""

import math
import random
from dataclasses import replace

import pytest
import torch

from llada.training.checkpoint.state import Cursor
from llada.training.ledger import CHECKPOINT, LOG, VALIDATION, Ledger
from llada.training.run import TrainConfig

STEPS = 24


def keep(losses: list[float], *, first: int = 0, cursor: Cursor | None = None, **knobs: int) -> tuple:
    """The book behind these losses, what was done at which step, and the looks that it took."""
    config = TrainConfig(**{"log_every": 3, "validate_every": 4, "checkpoint_every": 6} | knobs)
    ledger = Ledger(config, cursor or Cursor(), STEPS, first + len(losses))
    done, looks = [], []
    for loss in losses:
        ledger.note(10, torch.tensor(1.0, dtype=torch.float64), torch.tensor([loss, 2.0, 1.0]).double())
        if ledger.must_look():
            done += [("skipped", skip.step) for skip in ledger.look()]
            looks.append(ledger.cursor.step)
            if ledger.is_lost:
                break
            done += [(name, ledger.cursor.step) for name in sorted(ledger.due())]
            if LOG in ledger.due() and ledger.cursor.interval_steps:
                ledger.close_interval()
    return replace(ledger.cursor, seconds=0.0), done, looks


def losses_of(seed: int) -> list[float]:
    draw = random.Random(seed)
    return [math.nan if draw.random() < 0.2 else float(draw.randrange(1, 9)) for _ in range(STEPS)]


@pytest.mark.parametrize("seed", range(20))
def test_a_run_in_parts_is_the_run(seed: int) -> None:
    losses = losses_of(seed)
    whole, done, _ = keep(losses, max_bad_steps=50)
    for cut in (1, 7, 12, 23):
        first, early, _ = keep(losses[:cut], max_bad_steps=50)
        second, late, _ = keep(losses[cut:], first=cut, cursor=first, max_bad_steps=50)
        assert second == whole
        said = [entry for entry in early + late if entry[0] != CHECKPOINT]
        assert said == [entry for entry in done if entry[0] != CHECKPOINT]  # one more: at the cut


def test_sound_steps_are_looked_at_when_something_is_due_only() -> None:
    cursor, done, looks = keep([2.0] * STEPS, log_every=12, validate_every=24, checkpoint_every=24)
    assert looks == [12, 24]
    assert done == [(LOG, 12), (CHECKPOINT, 24), (LOG, 24), (VALIDATION, 24)]
    assert (cursor.tokens, cursor.train_loss, cursor.interval_steps) == (240, 2.0, 0)


def test_what_was_due_at_skipped_steps_is_due_at_the_next_sound_one() -> None:
    losses = [2.0] * 10
    losses[2] = losses[3] = losses[4] = losses[8] = math.nan
    _, done, _ = keep(losses, checkpoint_every=5, log_every=3, validate_every=4)
    assert done == [
        *(("skipped", 3), ("skipped", 4), ("skipped", 5)),
        *((CHECKPOINT, 6), (LOG, 6), (VALIDATION, 6)),
        *((VALIDATION, 8), ("skipped", 9)),
        *((CHECKPOINT, 10), (LOG, 10)),
    ]


def test_too_many_in_a_row_lose_the_run_at_their_last_step_whoever_looks_late() -> None:
    losses = [2.0, 2.0, math.nan, math.inf, math.nan, 2.0, 2.0, 2.0]
    for log_every in (1, 4, 8):
        cursor, done, _ = keep(losses, log_every=log_every, max_bad_steps=3)
        assert (cursor.step, cursor.bad_steps, cursor.skipped_steps) == (5, 3, 3)
        assert done[-1] == ("skipped", 5)


def test_a_return_keeps_what_it_has_cost() -> None:
    config = TrainConfig(rollback_lr_scale=0.5)
    ledger = Ledger(config, Cursor(step=9, skipped_steps=4, rollbacks=1, lr_scale=0.5, bad_steps=4), 20, 20)
    ledger.go_back(Cursor(step=6, skipped_steps=1, bad_steps=1))
    assert ledger.cursor == Cursor(step=6, skipped_steps=4, rollbacks=2, lr_scale=0.25, bad_steps=0)
