"""What a body asks of the engine: defaults and requests, rules, limits, text between gaps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llada.sampling.config import SamplingConfig
from pipelines.serving.dialects.completions import CompletionBody
from pipelines.serving.errors import RequestError
from pipelines.serving.replica import Denoiser


def body(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"prompt": [7, 7, 7], **fields})


def chosen(denoiser: Denoiser, **fields: Any) -> SamplingConfig:
    """The settings that the engine gets."""
    return denoiser.reader.requests_of(body(**fields))[1][0].sampling


def test_texts_that_are_named_are_spelled_once_for_all_choices(denoiser: Denoiser) -> None:
    """And before the engine, in whose event loop the other streams wait."""
    letter = denoiser.encoder.encode_text("a")
    _, requests = denoiser.reader.requests_of(
        body(max_tokens=4, n=3, forbidden={"*": ["a"] * 9_000 + letter})
    )
    assert requests[0].sampling.forbidden == {"*": tuple(letter)}
    assert all(request.sampling is requests[0].sampling for request in requests)
    with pytest.raises(RequestError, match="forbidden names 20,000 tokens; this endpoint takes 16,384"):
        body(max_tokens=4, forbidden={"*": ["a"] * 12_000, "1": ["a"] * 8_000})


def test_the_default_length_shrinks_where_the_context_ends(denoiser: Denoiser) -> None:
    assert chosen(denoiser, prompt=[7] * 10).gen_length == 8
    assert chosen(denoiser, prompt=[7] * (2048 - 3)).gen_length == 3
    with pytest.raises(RequestError, match="context length"):
        chosen(denoiser, prompt=[7] * (2048 - 3), max_tokens=4)


def test_what_a_request_says_replaces_the_defaults(denoiser: Denoiser) -> None:
    assert chosen(denoiser) == denoiser.sampling
    asked = {"steps": 5, "block_length": 4, "temperature": 0.5, "cfg_scale": 1.0, "remasking": "random"}
    assert chosen(denoiser, max_tokens=20, **asked) == SamplingConfig(gen_length=20, **asked)


def test_default_steps_are_enough_for_any_length(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are shared out among the blocks of a reply: who asks for a longer one gets a step for each of its blocks."""
    monkeypatch.setattr(denoiser.reader, "sampling", SamplingConfig(gen_length=8, steps=4, block_length=4))
    assert chosen(denoiser).steps == 4
    assert chosen(denoiser, max_tokens=30).steps == 8
    with pytest.raises(RequestError, match="steps 4 is too few"):
        chosen(denoiser, max_tokens=30, steps=4)


def test_a_reply_that_cannot_grow_does_not_and_who_asks_for_it_is_told(
    denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(denoiser, max_tokens=9, initial_length=8).initial_length == 8
    for fields in ({"max_tokens": 8}, {}, {"max_tokens": 9, "ignore_eos": True}):
        with pytest.raises(RequestError, match="^initial_length ") as caught:
            chosen(denoiser, initial_length=8, **fields)
        assert (caught.value.status, caught.value.param) == (400, "initial_length")
    growing = replace(denoiser.sampling, gen_length=16, initial_length=8, eos_window=4, insert_below=0.1)
    monkeypatch.setattr(denoiser.reader, "sampling", growing)
    assert chosen(denoiser) == growing
    assert chosen(denoiser, max_tokens=8) == SamplingConfig(gen_length=8, block_length=32)
    assert chosen(denoiser, ignore_eos=True) == SamplingConfig(gen_length=16, block_length=32)
    stopped = chosen(denoiser, ignore_eos=True, stop_token_ids=[9])
    assert stopped == growing
    assert chosen(denoiser, max_tokens=8, initial_length=4).eos_window == 4
    # What does not go with a growing canvas takes its place.
    go = denoiser.encoder.encode_text("G")[0]
    for wish in ({"fixed": {3: go}}, {"allowed": {0: [go]}}, {"suffix_window": 4}, {"steps": 8}):
        found = chosen(denoiser, **wish)
        assert (found.initial_length, found.eos_window) == (None, SamplingConfig().eos_window)
    assert chosen(denoiser, suffix=" Go on!", max_tokens=4) == SamplingConfig(gen_length=4, block_length=32)
    assert chosen(denoiser, suffix=["G", 3, "!"], max_tokens=9).initial_length is None
    for fields in ({"suffix": "G"}, {"fixed": {3: go}}):
        with pytest.raises(RequestError, match="leave it out, or"):
            chosen(denoiser, initial_length=8, max_tokens=9, **fields)


def test_defaults_stay_until_a_request_asks_for_another_rule(
    denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser.reader, "sampling", replace(denoiser.sampling, threshold=0.9))
    assert chosen(denoiser).threshold == 0.9
    assert chosen(denoiser, temperature=1.0).threshold == 0.9
    with pytest.raises(RequestError, match="choose one rule"):
        chosen(denoiser, threshold=0.9, factor=1.0)


@pytest.mark.parametrize(
    "default", [{"remasking": "random"}, {"threshold": 0.5}, {"remasking": "threshold", "threshold": 0.5}]
)
@pytest.mark.parametrize(
    "asked",
    [{"factor": 1.0}, {"threshold": 0.9}, {"remasking": "low_confidence"}, {"remasking": "ancestral"}],
)
def test_a_rule_of_the_request_replaces_the_default_one(
    denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, default: dict[str, Any], asked: dict[str, Any]
) -> None:
    monkeypatch.setattr(denoiser.reader, "sampling", SamplingConfig(**default))
    assert chosen(denoiser, max_tokens=8, **asked) == SamplingConfig(gen_length=8, **asked)


def test_a_prompt_has_its_limit(small_model: Path) -> None:
    """With its suffix; what can be seen to exceed it is refused before it is encoded."""
    denoiser = Denoiser(str(small_model), SamplingConfig(gen_length=8, steps=None), max_prompt_tokens=10)
    denoiser.close()
    assert chosen(denoiser, prompt=[7] * 10).gen_length == 8
    between = {"prompt": [7], "suffix": [" Go on, and on!", 3, "!"], "max_tokens": 3}
    for fields in (
        {"prompt": [7] * 11},
        {"prompt": [7] * 9, "suffix": " Go on!"},
        {"prompt": "Go " * 9000},
        between,
    ):
        with pytest.raises(RequestError, match="this endpoint takes 10 tokens, but the prompt has"):
            denoiser.reader.requests_of(body(**fields))
    with pytest.raises(RequestError, match="characters, more than"):
        denoiser.encoder.encode_text("Go on! " * 100)


def test_text_between_gaps_is_told_by_its_field(denoiser: Denoiser) -> None:
    (go,) = denoiser.encoder.encode_text("G")[:1]
    gaps: dict[str, Any] = {"suffix": ["G", 3, "!"], "max_tokens": 3}
    for fields, message in (
        (
            {"stop_token_ids": [go]},
            f"suffix: the text between two gaps holds the token id {go}, which ends a reply",
        ),
        ({"forbidden": {"*": [go]}}, "which suffix puts at position 3"),
    ):
        with pytest.raises(RequestError, match=re.escape(message)):
            denoiser.reader.requests_of(body(**gaps, **fields))


@pytest.mark.parametrize("fields", [{"max_tokens": 1374}, {"max_tokens": 1371, "echo": True}], ids=str)
def test_an_answer_tells_so_many_log_probabilities(denoiser: Denoiser, fields: dict[str, Any]) -> None:
    """Choices × tokens × alternatives, and those of an echoed prompt."""
    with pytest.raises(
        RequestError, match="would tell 263,808 log-probabilities, and at most 262,144"
    ) as caught:
        denoiser.reader.requests_of(body(n=32, logprobs=5, **fields))
    assert (caught.value.status, caught.value.param) == (400, "logprobs")
