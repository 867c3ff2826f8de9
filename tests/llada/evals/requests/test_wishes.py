"""What tasks of lm_eval ask for, in our settings."""

from __future__ import annotations

from typing import Any

import pytest

from llada.errors import UserError
from llada.evals.requests.wishes import Writer


def settings(
    wishes: dict[str, Any], *, gen_length: int | None = None, **sampling: Any
) -> tuple[dict[str, Any], list[str]]:
    return Writer(sampling, gen_length, context=600).settings(wishes)


@pytest.mark.parametrize(
    ("wishes", "gen_length", "found"),
    [
        ({}, None, 256),
        ({"max_gen_toks": 8}, None, 8),
        ({"max_new_tokens": 9}, None, 9),
        ({"max_tokens": 10}, None, 10),
        ({"max_completion_tokens": 11}, None, 11),
        ({"max_gen_toks": 8}, 16, 16),
    ],
    ids=str,
)
def test_lengths(wishes: dict[str, Any], gen_length: int | None, found: int) -> None:
    assert settings(wishes, gen_length=gen_length)[0]["gen_length"] == found


def test_stop_strings_are_one_or_several() -> None:
    assert [settings({"until": until})[1] for until in ("\n", ["a", None, "b"], None, [])] == [
        ["\n"],
        ["a", "b"],
        [],
        [],
    ]


def test_without_sampling_nothing_is_drawn() -> None:
    warm = {"temperature": 0.7, "top_p": 0.9}
    cold = settings({**warm, "do_sample": False})[0]
    assert (cold["temperature"], cold["top_p"]) == (None, 1.0)
    # As in lm_eval's own models: a temperature alone asks for drawing, too.
    for asked in ({}, {"do_sample": True}):
        drawn = settings({**warm, **asked})[0]
        assert (drawn["temperature"], drawn["top_p"]) == (0.7, 0.9)
    assert settings({"temperature": 0.0})[0]["temperature"] is None
    # What a task asks for in our own words goes before what was given.
    assert settings({"block_length": 4}, block_length=8)[0]["block_length"] == 4


def test_what_is_not_drawn_though_it_is_asked_for_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        settings({"do_sample": False, "temperature": 0.625})
        settings({"do_sample": True})
    assert [record.getMessage().partition("asks for ")[2] for record in caplog.records] == [
        "do_sample=False at a temperature of 0.625: nothing is drawn",
        "do_sample=True without a temperature: nothing is drawn",
    ]
    settings({"do_sample": True}, temperature=0.5)
    settings({"do_sample": False, "temperature": 0})
    assert len(caplog.records) == 2


def test_a_gap_is_no_setting_and_nothing_for_an_autoregressive_checkpoint() -> None:
    wishes = {"gap": {"suffix": "behind", "answer": "right"}, "max_gen_toks": 7}
    assert settings(wishes)[0]["gen_length"] == 7
    with pytest.raises(UserError, match="is autoregressive and sees nothing behind a gap"):
        Writer({}, None, 600, is_causal=True).settings(wishes)
    with pytest.raises(UserError, match=r"is autoregressive .* sampling\.fixed"):
        Writer({"fixed": {0: 1}}, None, 600, is_causal=True).settings({})


def test_what_cannot_be_had_is_named() -> None:
    with pytest.raises(UserError, match="asks for num_beams=4, which this sampler has not"):
        settings({"num_beams": 4})
    with pytest.raises(
        UserError, match="600 tokens of an answer leave no room for a prompt in the context of 600"
    ):
        settings({"max_gen_toks": 600})
    for until in (5, ["a", 5], {"a": 1}):
        with pytest.raises(
            UserError, match="a task asks for until=.*, which is no text and no list of texts"
        ):
            settings({"until": until})
    with pytest.raises(UserError, match="block_length"):
        Writer({"block_length": 0}, None, 600)


@pytest.mark.parametrize(("given", "block"), [({}, 1024), ({"block_length": 32}, 32)])
def test_a_gap_is_one_block_unless_another_length_is_given(given: dict[str, int], block: int) -> None:
    wishes = {"gap": {"suffix": "behind", "answer": "right"}, "max_gen_toks": 7}
    settings, _ = Writer(given, None, 4096).settings(wishes)
    assert settings["block_length"] == block
