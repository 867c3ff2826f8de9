"""The knobs: declared once, refused outside their limits, and readable without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from llada.errors import UserError
from llada.sampling.config import SamplingConfig, request_knobs
from llada.settings import field_docs, from_json, to_json


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"gen_length": 0}, "gen_length must be at least 1, not 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"block_length": -1}, "block_length"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"cfg_scale": float("nan")}, "cfg_scale"),
        ({"threshold": 1.5}, "threshold must be at most 1"),
        ({"factor": -1.0}, "factor"),
        ({"schedule": "none"}, "schedule"),
    ],
    ids=str,
)
def test_a_value_outside_its_limits_is_named(bad: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**bad)


def test_every_knob_is_documented_and_survives_json() -> None:
    assert set(field_docs(SamplingConfig)) == {field.name for field in fields(SamplingConfig)}
    config = SamplingConfig(steps=None, threshold=0.9)
    assert from_json(SamplingConfig, to_json(config)) == config


def test_a_client_may_set_all_but_the_canvas_and_the_schedule() -> None:
    own = {field.name for field in fields(SamplingConfig)} - {field.name for field in request_knobs()}
    assert own == {"gen_length", "schedule"}


def test_reading_the_knobs_needs_no_torch() -> None:
    code = "import sys, llada.sampling.config as c; c.request_knobs(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
