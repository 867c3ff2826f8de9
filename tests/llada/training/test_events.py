"""Events of a training run as lines of JSON: the format of metrics.jsonl, byte for byte."""

import json
import math

import pytest

from llada.training.events import (
    CheckpointDue,
    CheckpointFailed,
    Event,
    RolledBack,
    RunStarted,
    Sampled,
    StepDone,
    StepSkipped,
    Validated,
    event_from_json,
    event_to_json,
)

LINES: list[tuple[Event, str]] = [
    (
        RunStarted(0, 8, 1000, 5.25, "float32", 2),
        '{"event": "start", "first_step": 0, "num_steps": 8, "parameters": 1000, "unigram_loss": 5.25, '
        '"precision": "float32", "workers": 2}',
    ),
    (
        StepDone(
            *(8, 6.800711810588837, 0.0008, 1.5, 16384, 13734.5, 0.25, 6867.25, 0.5, 3.5, 4.0, 2),
            noise_nats=(0.25, 0.0),
            noise_tokens=(20, 0),
        ),
        '{"event": "step", "step": 8, "loss": 6.800711810588837, "lr": 0.0008, "grad_norm": 1.5, "tokens": 16384, '
        '"tokens_per_second": 13734.5, "mfu": 0.25, "tokens_per_second_per_worker": 6867.25, "data_wait": 0.5, '
        '"allocated_gib": 3.5, "reserved_gib": 4.0, "skipped_steps": 2, '
        '"noise_nats": [0.25, 0.0], "noise_tokens": [20, 0]}',
    ),
    (
        Validated(4, 6.78093521296978, 1.25, averaged=True),
        '{"event": "validation", "step": 4, "loss": 6.78093521296978, "ratio": 1.25, "averaged": true}',
    ),
    (
        Sampled(4, ("nan", "“inf”\n")),
        '{"event": "samples", "step": 4, "texts": ["nan", "\\u201cinf\\u201d\\n"]}',
    ),
    (
        StepSkipped(5, float("inf"), float("-inf")),
        '{"event": "step_skipped", "step": 5, "loss": "inf", "grad_norm": "-inf"}',
    ),
    (
        RolledBack(4, 9, 0.5),
        '{"event": "rolled_back", "step": 4, "diverged_at": 9, "lr_scale": 0.5}',
    ),
    (CheckpointDue(4), '{"event": "checkpoint", "step": 4}'),
    (
        CheckpointFailed(4, "the store is away"),
        '{"event": "checkpoint_failed", "step": 4, "reason": "the store is away"}',
    ),
]


@pytest.mark.parametrize(("event", "line"), LINES, ids=[event.name for event, _ in LINES])
def test_events_as_lines_and_back(event: Event, line: str) -> None:
    assert json.dumps(event_to_json(event)) == line
    assert event_from_json(json.loads(line)) == event


def test_a_loss_that_is_no_number_is_json_all_the_same() -> None:
    line = json.dumps(event_to_json(StepSkipped(5, math.nan, 1.0)), allow_nan=False)
    back = event_from_json(json.loads(line))
    assert isinstance(back, StepSkipped)
    assert math.isnan(back.loss)
