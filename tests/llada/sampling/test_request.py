"""What is refused before a forward is spent on it, and what the network can just do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.config import SamplingConfig
from llada.sampling.request import GenerateRequest, check_request
from llada.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["The cat sat on the mat."] * 5, 300)
MASK = TOKENIZER.mask_token_id
MODEL = Transformer(ModelConfig(300, 16, 1, 2, 32, max_length=64, mask_token_id=MASK))
REQUEST = GenerateRequest([7], SamplingConfig(gen_length=24, block_length=8))


@pytest.mark.parametrize(
    ("changes", "knobs", "message"),
    [
        (
            {"prompt": [7] * 58},
            {},
            "gen_length=24 .* 82 tokens exceeds the context length of 64: at most gen_length=6 fits",
        ),
        ({"prompt": [7] * 30, "suffix": [7] * 11}, {}, "65 tokens exceeds"),
        ({}, {"steps": 2}, "steps=2 is too few for 3 blocks.*at least 3"),
        ({"suffix": [8]}, {"suffix_window": 2}, "suffix_window=2 would hide what is given behind the masks"),
        ({"prompt": [7, MASK]}, {}, "must not hold the mask token"),
        ({"suffix": [MASK]}, {}, "must not hold the mask token"),
        ({"prompt": [300]}, {}, "prompt: the token id 300"),
        ({"suffix": [-1]}, {}, "suffix: the token id -1"),
        ({}, {"fixed": {0: MASK}}, "fixed must not hold the mask token"),
        ({}, {"fixed": {0: 300}}, "fixed: the token id 300"),
        ({}, {"allowed": {0: (300,)}}, "allowed: the token id 300"),
        ({"forced": [MASK]}, {}, "the mask token .* cannot be written"),
        ({"forced": [7] * 25}, {}, "a place for each"),
        ({"forced": [7]}, {"initial_length": 2}, "does not grow"),
        ({"forced": [300]}, {}, "forced: the token id 300"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused_in_one_line(
    changes: dict[str, Any], knobs: dict[str, Any], message: str
) -> None:
    request = replace(REQUEST, **changes, sampling=replace(REQUEST.sampling, **knobs))
    with pytest.raises(UserError, match=message) as caught:
        check_request(request, MODEL, TOKENIZER, MASK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "knobs"),
    [
        ({"prompt": [7] * 40}, {}),
        ({"prompt": []}, {}),
        ({"prompt": [7] * 30, "suffix": [7] * 10}, {"steps": 3}),
        ({"forced": [7] * 24}, {}),
        ({}, {"suffix_window": 2, "fixed": {23: 299}}),
    ],
    ids=str,
)
def test_what_just_fits_is_taken(changes: dict[str, Any], knobs: dict[str, Any]) -> None:
    request = replace(REQUEST, **changes, sampling=replace(REQUEST.sampling, **knobs))
    assert check_request(request, MODEL, TOKENIZER, MASK) is None  # type: ignore[func-returns-value]
