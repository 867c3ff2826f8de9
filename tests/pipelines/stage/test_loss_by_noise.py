"""The picture of the loss by noise level: what its curves say, and that a run without masks has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from llada.training.events import StepDone, Validated
from pipelines.stage.loss_by_noise import NOISE_PLOT, loss_curve, plot_loss_by_noise


def step(number: int, nats: tuple[float, ...] = (), tokens: tuple[int, ...] = ()) -> StepDone:
    return StepDone(number, 5.0, 1e-3, 1.0, 640, 1e4, 0.25, noise_nats=nats, noise_tokens=tokens)


def test_a_curve_is_the_mean_over_tokens_at_the_levels_that_came():
    logged = [step(1, (1.0, 0.0, 4.0, 0.0), (30, 0, 1, 0)), step(2, (2.0, 0.0, 0.0, 6.0), (10, 0, 0, 5))]
    levels, nats = loss_curve(logged)
    assert levels.tolist() == [0.125, 0.625, 0.875]
    assert nats.tolist() == pytest.approx([50 / 40, 4.0, 6.0])


def test_a_level_with_a_handful_of_tokens_is_left_out():
    levels, _ = loss_curve([step(1, (1.0, 2.0, 9.0, 0.0), (10, 990, 2, 0))])
    assert levels.tolist() == [0.125, 0.375]


@pytest.mark.parametrize("number", [1, 3, 9])
def test_the_picture_of_a_run(tmp_path, number):
    events = [step(n, (1.0, 2.0), (3, 4)) for n in range(number)]
    assert plot_loss_by_noise([*events, Validated(9, 4.0, 0.8)], str(tmp_path), "pretrain")
    assert Path(tmp_path, NOISE_PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_run_that_masks_nothing_has_none(tmp_path):
    assert not plot_loss_by_noise([step(1), Validated(1, 4.0, 0.8)], str(tmp_path), "pretrain")
    assert list(tmp_path.iterdir()) == []
