"""The knobs: declared once, refused outside their limits, and readable without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import numpy as np
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


def test_a_client_may_set_all_but_the_canvas() -> None:
    own = {field.name for field in fields(SamplingConfig)} - {field.name for field in request_knobs()}
    assert own == {"gen_length"}


def test_reading_the_knobs_needs_no_torch() -> None:
    code = "import sys, llada.sampling.config as c; c.request_knobs(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


INF, NAN = float("inf"), float("nan")
WRONG: dict[str, list[object]] = {
    "gen_length": [0, -1, 1.5, INF, NAN, True, "8", None, 10**400, 10**5000, 2**63],
    "initial_length": [0, -1, 1.5, INF, NAN, True, "8", 10**400],
    "expansion_length": [1, 1.5, INF, NAN, True, "8", None, 10**400, 4],
    "eos_window": [0, 1.5, INF, NAN, True, "8", None, 10**400, 4],
    "eos_threshold": [-0.1, 1.5, INF, NAN, True, "0.5", None, 0.4],
    "insert_below": [-0.1, 1.5, INF, NAN, True, "0.1", 0.1],
    "insert_eos_threshold": [-0.1, 1.5, INF, NAN, True, "0.9", None, 0.8],
    "steps": [0, 2.0, INF, NAN, False, "8", 10**400, 2**63],
    "block_length": [0, INF, True, "8", None, 10**400],
    "temperature": [
        -0.1,
        INF,
        -INF,
        NAN,
        True,
        "0.5",
        101,
        10**400,
        np.float32("nan"),
        np.float64("inf"),
        [0.5],
    ],
    "top_p": [-0.1, 1.1, INF, NAN, True, "0.9", None, 0.9],
    "top_k": [-2, 1.5, INF, True, "4", None, 10**400, 4],
    "min_p": [-0.1, 1.1, INF, NAN, True, "0.1", None, 0.1],
    "stratified": [1, 0, "true", None, NAN, True],
    "cfg_scale": [-1, INF, NAN, True, "1", None, 1e300, 10**400],
    "threshold": [-0.1, 1.5, INF, NAN, True, "0.9", np.float32("nan")],
    "factor": [-1.0, INF, NAN, True, "1", 10**400],
    "entropy_bound": [-1.0, INF, NAN, True, "1", 10**400],
    "error_bound": [-1.0, INF, NAN, True, "1", 10**400],
    "leap_threshold": [-0.1, 1.5, INF, NAN, True, "0.9", 0.95],
    "leap_anchor": [-0.1, 1.5, INF, NAN, True, "0.9", None, 0.8],
    "leap_radius": [-1, 1.5, INF, NAN, True, "2", None, 2],
    "remdm_cap": [-0.1, 1.5, INF, NAN, True, "0.9"],
    "p2_eta": [-1.0, INF, NAN, True, "1", 10**400],
    "remasking": ["lowest", 3, None, True, NAN, ["random"], {"a": 1}],
    "cache": ["duel", 3, True, NAN, ["dual"]],
    "refresh_every": [0, -1, 1.5, INF, NAN, True, "2", 4],
    "vicinity": [-1, 1.5, INF, NAN, True, "2", None, 4],
    "prompt_interval": [0, 1.5, INF, NAN, True, "2", None, 4],
    "response_interval": [0, 1.5, INF, NAN, True, "2", None, 4],
    "refresh_share": [-0.1, 1.5, INF, NAN, True, "1", None, 0.5],
    "suffix_window": [-1, 1.5, INF, NAN, True, "2"],
    "shared_depth": [-0.1, 1.5, INF, NAN, True, "1", None],
    "shared_prefix": [0, 1.5, INF, NAN, True, "2", 4],
    "schedule": ["none", 3, None, True, ["cosine"], "cosine"],
    "logits_eos_inf": [1, 0, "true", None, NAN],
    "confidence_eos_eot_inf": [1, 0, "true", None, NAN],
    "fixed": [
        3,
        "x",
        [1],
        {-1: 3},
        {8: 3},
        {True: 3},
        {0: -1},
        {0: 2**31},
        {0: ""},
        {0: 1.5},
        {0: True},
        {"0": 3},
        {NAN: 1},
    ],
    **{
        name: [
            3,
            "x",
            [1],
            {-1: [3]},
            {8: [3]},
            {True: [3]},
            {"0": [3]},
            {"**": [3]},
            {0: 3},
            {0: "x"},
            {0: []},
            {0: [-1]},
            {0: [""]},
            {0: [1.5]},
            {0: [True]},
            {0: [None]},
            {"*": []},
        ]
        for name in ("allowed", "forbidden")
    },
}


def test_every_knob_is_tried_with_what_it_is_not() -> None:
    assert set(WRONG) == {field.name for field in fields(SamplingConfig)}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_means_nothing_is_refused_in_one_line(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(UserError) as caught:
            SamplingConfig(**{"gen_length": 8, name: value})
        message = str(caught.value)
        assert name in message
        assert "\n" not in message
        assert len(message) < 250


def test_numbers_of_other_libraries_are_numbers() -> None:
    config = SamplingConfig(
        gen_length=np.int64(4), steps=np.int32(2), temperature=np.float32(0.5), cfg_scale=1
    )
    assert (config.gen_length, config.temperature) == (4, 0.5)
    assert SamplingConfig(temperature=-0.0).temperature == 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"schedule": "cosine"}, "schedule='cosine' means nothing to remasking='low_confidence'"),
        ({"schedule": "cosine", "threshold": 0.5}, "remasking='low_confidence' with threshold"),
        (
            {"confidence_eos_eot_inf": True, "remasking": "random"},
            "confidence_eos_eot_inf=True means nothing",
        ),
        (
            {"confidence_eos_eot_inf": True, "remasking": "ancestral"},
            "confidence_eos_eot_inf=True means nothing",
        ),
        ({"confidence_eos_eot_inf": True, "entropy_bound": 1.0}, "confidence_eos_eot_inf=True means nothing"),
        ({"vicinity": 4, "cache": "dual"}, "vicinity=4 means nothing to cache='dual'"),
        (
            {"leap_radius": 2, "threshold": 0.9},
            "leap_radius=2 means nothing to remasking='low_confidence' with",
        ),
        ({"top_p": 0.9}, "top_p=0.9 means nothing without a temperature"),
        ({"stratified": True, "threshold": 0.5}, "stratified=True means nothing without a temperature"),
        ({"leap_threshold": 0.8, "leap_anchor": 0.7}, "leap_threshold=0.8 lies above leap_anchor=0.7"),
        ({"remasking": "p2"}, "remasking='p2' needs the setting p2_eta"),
        ({"refresh_every": 4, "cache": "interval"}, "refresh_every=4 means nothing to cache='interval'"),
        ({"prompt_interval": 4, "cache": "dual"}, "prompt_interval=4 means nothing to cache='dual'"),
        ({"shared_prefix": 4}, "shared_prefix=4 means nothing without shared_depth"),
        ({"refresh_every": 4}, "refresh_every=4 means nothing to cache=None"),
        ({"insert_below": 0.1}, "insert_below=0.1 means nothing without initial_length"),
    ],
    ids=str,
)
def test_what_a_rule_would_not_heed_is_refused(knobs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**knobs)


def test_fixed_survives_json_whose_keys_are_text() -> None:
    config = SamplingConfig(gen_length=8, fixed={0: " word", 5: 17})
    assert from_json(SamplingConfig, to_json(config)) == config
    with pytest.raises(UserError, match=r"fixed must be .*, not \{'x': 3\}"):
        from_json(SamplingConfig, '{"fixed": {"x": 3}}')


OF_INTERVAL = {"prompt_interval", "response_interval", "refresh_share"}


def test_in_force_are_the_knobs_that_the_rule_heeds() -> None:
    every = {field.name for field in fields(SamplingConfig)}
    leap = {"leap_anchor", "leap_radius"}

    def idle(**knobs: object) -> set[str]:
        return every - SamplingConfig(**knobs).in_force().keys()  # type: ignore[arg-type]

    no_cache = {"vicinity", "refresh_every", *OF_INTERVAL}
    fixed_length = {"expansion_length", "eos_window", "eos_threshold", "insert_below", "insert_eos_threshold"}
    assert idle() == {"schedule", *no_cache, *leap, *fixed_length}
    assert idle(remasking="ancestral", cache="vicinity") == {
        "confidence_eos_eot_inf",
        *OF_INTERVAL,
        *leap,
        *fixed_length,
    }
    assert idle(entropy_bound=0.1) == {
        "confidence_eos_eot_inf",
        "schedule",
        *no_cache,
        *leap,
        *fixed_length,
    }
    assert idle(leap_threshold=0.8) == {"schedule", *no_cache, *fixed_length}
    assert idle(cache="interval") == {"schedule", "vicinity", "refresh_every", *leap, *fixed_length}
    assert idle(initial_length=8) == {"schedule", *no_cache, *leap, "insert_eos_threshold"}
    assert idle(initial_length=8, insert_below=0.1) == {"schedule", *no_cache, *leap}


def test_how_to_draw_goes_with_a_temperature() -> None:
    """Greedy when it is asked for is what any cut of it is; a rule that samples has a temperature."""
    for knobs in ({"temperature": 0.7}, {"temperature": 0.0}, {"remasking": "ancestral"}, {"remdm_cap": 0.1}):
        assert SamplingConfig(top_p=0.9, top_k=5, min_p=0.1, stratified=True, **knobs).top_k == 5
    assert SamplingConfig(top_k=-1).top_k == -1  # asks for nothing
