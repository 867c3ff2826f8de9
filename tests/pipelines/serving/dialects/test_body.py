"""The shared body: knobs as the sampler declares them, what is refused, and strict parsing."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from llada.sampling.config import request_knobs
from pipelines.serving.dialects.body import SamplingBody, parse_body
from pipelines.serving.dialects.completions import CompletionBody
from pipelines.serving.errors import RequestError


def parse(**fields: Any) -> CompletionBody:
    return parse_body(CompletionBody, json.dumps({"prompt": "Go", **fields}).encode())


def problem(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    return caught.value


# What clients rely on: the smallest and the largest value of each knob; None: there is none.
RANGES = {
    "steps": (1, 4096),
    "block_length": (1, None),
    "temperature": (0, 2),
    "cfg_scale": (0, None),
    "threshold": (0, 1),
    "factor": (0, None),
    "entropy_bound": (0, None),
}


def test_every_knob_that_a_request_may_set_is_a_field() -> None:
    names = [knob.name for knob in request_knobs()]
    assert set(names) == {*RANGES, "remasking", "logits_eos_inf", "confidence_eos_eot_inf", "fixed"}
    for name in names:
        assert SamplingBody.model_fields[name].description
        assert SamplingBody.model_fields[name].default is None
    assert "gen_length" not in SamplingBody.model_fields
    assert "schedule" not in SamplingBody.model_fields


@pytest.mark.parametrize("name", RANGES)
def test_the_range_of_a_knob(name: str) -> None:
    low, high = RANGES[name]
    assert parse(**{name: low}).knobs() == {name: low}
    assert f"{name}: input should be greater than or equal to {low}" in problem(**{name: low - 1}).message
    if high is None:
        assert parse(**{name: 10**6}).knobs() == {name: 10**6}
    else:
        assert parse(**{name: high}).knobs() == {name: high}
        assert f"{name}: input should be less than or equal to {high}" in problem(**{name: high + 1}).message
    assert problem(**{name: "1"}).param == name  # no number in quotes, no true for 1
    assert problem(**{name: True}).param == name


def test_only_what_is_said_is_asked_for() -> None:
    assert parse().knobs() == {}
    assert parse(steps=None, temperature=None).knobs() == {}
    assert parse(temperature=0, remasking="anything").knobs() == {"temperature": 0, "remasking": "anything"}


def test_misspelt_names_come_with_the_nearest() -> None:
    assert problem(stepz=3).message == "unknown field 'stepz'; did you mean 'steps'?"
    inside = problem(stream=True, stream_options={"include_usag": True})
    assert "did you mean 'include_usage'?" in inside.message
    assert inside.param == "stream_options.include_usag"


def test_refused_fields_name_their_reason() -> None:
    error = problem(top_p=0.9)
    assert (error.status, error.param, error.code) == (400, "top_p", "unsupported_parameter")
    assert error.message == "top_p=0.9 is not supported: use temperature"
    assert parse(top_p=1.0, logprobs=False, tools=[], store=None).knobs() == {}
    assert "not supported" in problem(logprobs=0).message  # 0 is not false


def test_a_body_travels_to_the_replica() -> None:
    sent = parse(steps=3, stop="x", stream=True, stream_options={"include_canvas": True})
    assert pickle.loads(pickle.dumps(sent)) == sent


def test_fixed_tokens_are_positions_and_ids_or_words() -> None:
    assert parse(fixed={"0": " word", "12": 7}).knobs() == {"fixed": {0: " word", 12: 7}}
    for bad in ({"x": 1}, {"0": 1.5}, {"0": True}, {"0": [1]}, [1], "0:word"):
        assert problem(fixed=bad).param.startswith("fixed")
    assert parse(logits_eos_inf=True).knobs() == {"logits_eos_inf": True}
    assert problem(logits_eos_inf=1).param == "logits_eos_inf"
