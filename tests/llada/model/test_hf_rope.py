"""The rotary positions in a config.json: the same in the old and the new spelling, refused where they are not computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llada.errors import UserError
from llada.model.hf_rope import ROPE_KEYS, read_rope, write_rope
from llada.model.rotary import UNSCALED, RopeScaling

FILE = Path("folder/config.json")
# As published with Llama-3.2-1B, and how transformers 5 writes the same.
PUBLISHED = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA3 = RopeScaling("llama3", factor=32.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeScaling("yarn", factor=4.0, original_length=32768)


def read(max_length: int = 131072, can_scale: bool = True, **rope: Any) -> tuple[float, RopeScaling]:
    keys = {**dict.fromkeys(ROPE_KEYS), **rope}
    return read_rope(keys, FILE, default_theta=1e4, max_length=max_length, can_scale=can_scale)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, (1e4, UNSCALED)),
        ({"rope_theta": 5e5, "rope_scaling": PUBLISHED}, (5e5, LLAMA3)),
        ({"rope_parameters": {**PUBLISHED, "rope_theta": 5e5}}, (5e5, LLAMA3)),
        ({"rope_parameters": {**PUBLISHED, "rope_theta": 5e5}, "rope_scaling": PUBLISHED}, (5e5, LLAMA3)),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, (1e4, RopeScaling("linear", factor=4.0))),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            (1e4, YARN),
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "mscale": None,
                    "truncate": True,
                },
                "max_length": 32768,
            },
            (1e4, YARN),  # where none is said, the context is the original one
        ),
        ({"rope_scaling": {"rope_type": "default", "factor": 1.0}}, (1e4, UNSCALED)),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": None}}, (7.0, UNSCALED)),
    ],
    ids=str,
)
def test_every_spelling_is_read(rope: dict[str, Any], expected: tuple[float, RopeScaling]) -> None:
    assert read(**rope) == expected


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling = .*dynamic.* are not supported",
        ),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
            "not supported, only linear, llama3",
        ),
        (
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
            "longrope.*not supp",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}, "not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale.* not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "not supported"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters = .*full_attention",
        ),
        ({"rope_parameters": {**PUBLISHED, "partial_rotary_factor": 0.5}}, "not supported"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "llama3.*: kind llama3 needs low_freq_factor",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "kind linear needs factor"),
        ({"rope_scaling": {**PUBLISHED, "beta_fast": 2.0}}, "beta_fast is not of kind llama3"),
        ({"rope_scaling": {**PUBLISHED, "factor": "8"}}, "factor must be float or null"),
        (
            {"rope_scaling": PUBLISHED, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters and rope_scaling contradict each other",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {**PUBLISHED, "rope_theta": 5e5}},
            "rope_theta = 10000.0 and rope_parameters.rope_theta = 500000.0 contradict each other",
        ),
        ({"rope_scaling": PUBLISHED, "can_scale": False}, "rope_scaling = .* not supported in this layout"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_name(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^folder/config.json: .*{message}") as caught:
        read(**rope)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "scaling",
    [
        UNSCALED,
        LLAMA3,
        RopeScaling("linear", factor=2.0),
        RopeScaling(
            "yarn", factor=8, original_length=64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.0
        ),
    ],
)
def test_what_is_written_is_read_again(scaling: RopeScaling) -> None:
    assert read(**write_rope(123.0, scaling)) == (123.0, scaling)
    assert write_rope(123.0, UNSCALED) == {"rope_theta": 123.0}
    assert write_rope(5e5, LLAMA3) == {"rope_theta": 5e5, "rope_scaling": PUBLISHED}
