"""What one request may ask for is refused before anything is tokenised."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.dialects.chat import ChatBody
from pipelines.serving.dialects.completions import CompletionBody
from pipelines.serving.errors import RequestError
from pipelines.serving.limits import RequestLimits

LIMITS = RequestLimits(choices=4, messages=3)


def turns(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Go"}] * number}


@pytest.mark.parametrize(
    ("kind", "good", "bad", "message", "param"),
    [
        (ChatBody, turns(3), turns(4), "4 messages are more than the 3 allowed", "messages"),
        (ChatBody, turns(1) | {"n": 4}, turns(1) | {"n": 5}, "1 prompts × n=5 are more than the 4", "n"),
        (CompletionBody, {"prompt": ["x"] * 4}, {"prompt": ["x"] * 5}, "5 prompts × n=1 are", "prompt"),
        (
            CompletionBody,
            {"prompt": ["x"] * 2, "n": 2},
            {"prompt": ["x"] * 3000, "n": 2},
            "3000 prompts",
            "n",
        ),
    ],
)
def test_one_more_than_the_limit_is_refused(
    kind: type[SamplingBody], good: dict[str, Any], bad: dict[str, Any], message: str, param: str
) -> None:
    LIMITS.check(kind.model_validate(good))
    with pytest.raises(RequestError, match=message) as caught:
        LIMITS.check(kind.model_validate(bad))
    assert (caught.value.status, caught.value.param) == (400, param)
