"""What people write is theirs: no log of ours holds a prompt or an answer, however a request ends."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from pipelines.serving.events import ReplicaEvent
from pipelines.serving.replica import Denoiser

SECRET = "my number is 4929-1111"


class Failing:
    """A model's side that fails before its first event, or behind it."""

    def __init__(self, denoiser: Denoiser, *, after: int) -> None:
        self.denoiser, self.after = denoiser, after

    def check_health(self) -> None:
        return

    async def stream(self, *request: Any) -> AsyncGenerator[ReplicaEvent, None]:
        number = 0
        async for event in self.denoiser.stream(*request):
            if number == self.after:
                raise RuntimeError("the device is gone")
            number += 1
            yield event


BODIES = [
    {"prompt": SECRET},
    {"prompt": SECRET, "stream": True},
    {"prompt": SECRET, "max_tokens": 10**6},
    {"prompt": SECRET, "stop": ["x"] * 99, "nothing": SECRET},
    {"prompt": SECRET, "temperature": SECRET},
    SECRET.encode(),
]


@pytest.mark.parametrize("after", [None, 0, 3])
def test_no_log_holds_a_prompt(call, denoiser, caplog, capfd, after: int | None):
    backend = denoiser if after is None else Failing(denoiser, after=after)
    with caplog.at_level(logging.DEBUG):
        answers = [call(backend, "POST", "/v1/completions", body) for body in BODIES]
        chat = {"messages": [{"role": "user", "content": SECRET}]}
        answers.append(call(backend, "POST", "/v1/chat/completions", chat))
    statuses = [answer.status_code for answer in answers]
    assert statuses[3:6] == [400] * 3
    assert statuses[0] == statuses[-1] == (200 if after is None else 500)
    if after is not None:
        assert "the device is gone" in caplog.text  # what failed is told
    assert SECRET not in caplog.text
    assert SECRET not in "".join(capfd.readouterr())
