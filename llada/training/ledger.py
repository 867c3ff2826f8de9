"""What is known of a run's steps: the figures that wait on the device, the cursor that they move, and what is due at which.

Between two looks nobody waits for the device. A look adds up all the steps since the last one, in their order, so what a run
does follows from its steps alone, and not from when somebody looked.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from llada.training.checkpoint.state import Cursor
from llada.training.events import StepSkipped
from llada.training.metrics import add_up
from llada.training.run import TrainConfig

LOG, VALIDATION, CHECKPOINT = "log", "validation", "checkpoint"


class Ledger:
    """The book of one attempt at a run, which goes on from `cursor`.

    Args:
        num_steps: of the whole run.
        last_step: with which this attempt ends.
    """

    def __init__(self, config: TrainConfig, cursor: Cursor, num_steps: int, last_step: int) -> None:
        self.config, self.cursor, self.num_steps, self.last_step = config, cursor, num_steps, last_step
        self.loss = self.grad_norm = math.nan
        """Of the last step that was looked at."""
        self._intervals = {
            LOG: config.log_every,
            VALIDATION: config.validate_every,
            CHECKPOINT: config.checkpoint_every,
        }
        self._unseen: list[Tensor] = []
        self._last_sound = cursor.step
        self._began = time.perf_counter() - cursor.seconds

    def note(self, tokens: int, grad_norm: Tensor, sums: Tensor) -> None:
        """A step is done: of all workers' tokens, the gradient's norm () and what `train_step` gave, on the device."""
        self._unseen.append(torch.cat([torch.full_like(sums[:1], tokens), grad_norm[None], sums]))

    def must_look(self) -> bool:
        """Is anything due at the step that was noted last, or does the run wait for a sound one?"""
        step = self.cursor.step + len(self._unseen)
        is_due = any(step % every == 0 for every in self._intervals.values())
        return is_due or step == self.last_step or self.cursor.bad_steps > 0

    def look(self) -> list[StepSkipped]:
        """Wait for the device, and add up the steps since the last look, to the first with which `max_bad_steps` are skipped
        in a row; those that are skipped."""
        skipped = []
        for tokens, norm, loss, *by_noise in torch.stack(self._unseen).tolist():
            cursor, is_bad = self.cursor, not math.isfinite(loss + norm)
            self._last_sound = cursor.step - cursor.bad_steps
            self.loss, self.grad_norm = loss, norm
            self.cursor = replace(
                cursor,
                step=cursor.step + 1,
                tokens=cursor.tokens + int(tokens),
                seconds=time.perf_counter() - self._began,
                interval_loss=cursor.interval_loss + (0.0 if is_bad else loss),
                interval_steps=cursor.interval_steps + (not is_bad),
                interval_noise=cursor.interval_noise if is_bad else add_up(cursor.interval_noise, by_noise),
                bad_steps=cursor.bad_steps + 1 if is_bad else 0,
                skipped_steps=cursor.skipped_steps + is_bad,
            )
            if is_bad:
                skipped.append(StepSkipped(self.cursor.step, loss, norm))
            if self.is_lost:
                break
        self._unseen.clear()
        return skipped

    @property
    def is_lost(self) -> bool:
        """Have too many steps in a row been skipped?"""
        return self.cursor.bad_steps >= self.config.max_bad_steps

    def due(self) -> set[str]:
        """What is to be done at the step that was looked at last. What was due at skipped steps is due at the next sound one."""
        step, is_end = self.cursor.step, self.cursor.step == self.num_steps
        due = {CHECKPOINT} if step == self.last_step else set()
        if self.cursor.bad_steps == 0 or is_end:
            for name, every in self._intervals.items():
                if step // every > self._last_sound // every or is_end:
                    due.add(name)
        return due

    def close_interval(self) -> None:
        """The mean loss since the last log becomes the cursor's; a new interval begins."""
        cursor = self.cursor
        mean = cursor.interval_loss / cursor.interval_steps
        self.cursor = replace(cursor, train_loss=mean, interval_loss=0.0, interval_steps=0, interval_noise=())

    def go_back(self, restored: Cursor) -> None:
        """The run goes on from an earlier checkpoint with lower rates; what it has cost stays in the book."""
        self.cursor = replace(
            restored,
            bad_steps=0,
            skipped_steps=self.cursor.skipped_steps,
            rollbacks=self.cursor.rollbacks + 1,
            lr_scale=self.cursor.lr_scale * self.config.rollback_lr_scale,
        )
