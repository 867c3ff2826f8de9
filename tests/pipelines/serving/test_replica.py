"""The model's side of the endpoint: defaults and requests, choices, and rules from outside."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch._inductor import config as inductor

from llada.errors import UserError
from llada.files import sha256
from llada.registry import load_plugins
from llada.sampling.config import SamplingConfig
from llada.sampling.events import Finished, Started, Text
from llada.sampling.rules import RULES
from pipelines.serving.dialects.completions import CompletionBody
from pipelines.serving.events import ReplicaEvent, Serving
from pipelines.serving.replica import Denoiser

CONTEXT = 2048


def body(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"prompt": [7, 7, 7], **fields})


def events_of(denoiser: Denoiser, request: CompletionBody) -> list[ReplicaEvent]:
    async def collect() -> list[ReplicaEvent]:
        return [event async for event in denoiser.stream(request)]

    return asyncio.run(collect())


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_to_be_said_at_a_time_is_said_at_once(denoiser: Denoiser, stream: bool) -> None:
    """A forward's events are one list at the most, whatever they are; a whole reply is told of when it begins, of its first
    text, each second and when its choices end, be it long or short."""
    request = body(max_tokens=64, block_length=1, temperature=1.0, seed=0, n=2, stream=stream)

    async def collect() -> list[list[ReplicaEvent]]:
        return [events async for events in denoiser.batches(request)]

    began = time.monotonic()
    batches = asyncio.run(collect())
    seconds = time.monotonic() - began
    assert [type(event) for event in batches[0][:2]] == [Serving, Started]
    assert all(batches)
    assert len(batches) <= (1 + 64 if stream else 2 + 1 + 2 + seconds)
    told = [event for events in batches for event in events]
    single = events_of(denoiser, request)
    for choice in range(2):
        text, other = (
            "".join(e.text for e in events if isinstance(e, Text) and e.index == choice)
            for events in (told, single)
        )
        assert text == other != ""
    assert [e for e in told if isinstance(e, Finished)] == [e for e in single if isinstance(e, Finished)]


def test_the_default_length_shrinks_where_the_context_ends(denoiser: Denoiser) -> None:
    (*_, end) = events_of(denoiser, body(prompt=[7] * (CONTEXT - 3), temperature=1.0, seed=0))
    assert isinstance(end, Finished)
    assert end.completion_tokens == 3


def test_choices_of_a_prompt_share_it_and_have_seeds_of_their_own(denoiser: Denoiser) -> None:
    request = body(prompt=["Go", "One, two"], n=2, echo=True, seed=2**63 - 1, temperature=1.0)
    _, requests = denoiser.reader.requests_of(request)
    assert [r.seed for r in requests] == [2**63 - 1, 0] * 2
    assert requests[0].prompt == requests[1].prompt != requests[2].prompt
    events = events_of(denoiser, request)
    for index in range(4):
        own = [event for event in events if getattr(event, "index", None) == index]
        assert own[0] == Started(index)
        assert own[1] == Text(index, ["Go", "One, two"][index // 2])
        assert isinstance(own[-1], Finished)
        assert (own[-1].prompt_tokens > 0) == (index % 2 == 0)


@pytest.mark.parametrize("token", ["<|eot_id|>", "<|startoftext|>", "<|end_header_id|>"])
def test_a_special_token_as_a_stop_string_stops(denoiser: Denoiser, small_model: Path, token: str) -> None:
    """The network is certain of the token at the third place of the reply."""
    tokenizer = denoiser.engine.tokenizer
    wanted = [30, 31, tokenizer.convert_tokens_to_ids(token), 32, 33]

    class Certain:
        def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*tokens.shape, len(tokenizer))
            for place, number in enumerate(wanted):
                logits[:, 3 + place, number] = 20 - place
            return logits

    scripted = Denoiser(str(small_model), SamplingConfig(gen_length=5, steps=None, block_length=5))
    scripted.engine.model = Certain()
    *_, stopped = events_of(scripted, body(stop=["never there", token]))
    *_, full = events_of(scripted, body(stop="never there"))
    scripted.close()
    assert isinstance(stopped, Finished)
    assert isinstance(full, Finished)
    assert (stopped.reason, stopped.completion_tokens) == ("stop", 2)
    assert (full.reason, full.completion_tokens) == (("stop", 2) if token == "<|eot_id|>" else ("length", 5))


def test_a_stop_string_that_can_never_be_met_is_refused(denoiser: Denoiser) -> None:
    for stop in ("<|eot_id|>\n", "<|mdm_mask|>"):
        (event,) = events_of(denoiser, body(stop=stop))
        assert (event.status, event.param) == (400, "stop")  # type: ignore[union-attr]


def test_altered_weights_are_not_served(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    weights = folder / "model.safetensors"
    files = {weights.name: {"bytes": weights.stat().st_size, "sha256": sha256(str(weights))}}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    good = Denoiser(str(folder), SamplingConfig())
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=rf"cannot serve {folder}: model\.safetensors is not the file"):
        Denoiser(str(folder), SamplingConfig())
    unchecked = Denoiser(str(folder), SamplingConfig(), verify_checksums=False)
    (folder / "manifest.json").unlink()
    altered = Denoiser(str(folder), SamplingConfig())
    for denoiser in (good, unchecked, altered):
        denoiser.close()
    assert good.fingerprint != altered.fingerprint


def test_the_fingerprint_says_what_answers(denoiser: Denoiser, small_model: Path) -> None:
    first, *_ = events_of(denoiser, body(max_tokens=2))
    assert first == Serving(denoiser.fingerprint, version="")
    same, other, invariant = (
        Denoiser(str(small_model), sampling, max_concurrent=7, batch_invariant=batch_invariant)
        for sampling, batch_invariant in (
            (denoiser.sampling, False),
            (replace(denoiser.sampling, block_length=4), False),
            (denoiser.sampling, True),
        )
    )
    for each in (same, other, invariant):
        each.close()
    assert same.fingerprint == denoiser.fingerprint
    assert len({denoiser.fingerprint, other.fingerprint, invariant.fingerprint}) == 3


def test_without_a_compiler_no_replica_starts_compiled(small_model: Path) -> None:
    with (
        inductor.patch("cpp.cxx", (None, "no-such-compiler")),
        pytest.raises(UserError, match=r"compiled: torch finds no C\+\+ compiler"),
    ):
        Denoiser(str(small_model), SamplingConfig(), compiled=True)


def test_a_request_that_cannot_be_served_is_one_event(denoiser: Denoiser) -> None:
    (event,) = events_of(denoiser, body(max_tokens=CONTEXT))
    assert (event.status, event.param) == (400, "prompt")  # type: ignore[union-attr]


def test_what_cannot_be_served_is_the_users_to_mend(small_model: Path, tmp_path: Path) -> None:
    sampling = SamplingConfig()
    with pytest.raises(UserError, match="try bfloat16"):
        Denoiser(str(small_model), sampling, dtype="float17")
    for device in ("cuda:99", "gpu"):
        with pytest.raises(UserError, match=f"there is no device '{device}' here"):
            Denoiser(str(small_model), sampling, device=device)
    with pytest.raises(UserError, match=r"cannot serve .* no config\.json"):
        Denoiser(str(tmp_path), sampling)
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Denoiser(str(folder), sampling)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        Denoiser(str(folder), sampling)


TOY_RULE = """
from llada.sampling.rules import RULES, Rule, highest

RULES.register("left_to_right")(Rule(lambda c: highest(c.table(-c.slot.double()), c.quota)))
"""


def test_a_rule_from_outside_works_over_http(
    denoiser: Denoiser,
    post: Callable[..., httpx.Response],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "toy_rules.py").write_text(TOY_RULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(RULES, "_entries", dict(RULES._entries))  # forgets the toy again
    request = {"prompt": "Go", "remasking": "left_to_right", "stream": True, "max_tokens": 6}
    request |= {"stream_options": {"include_drafts": True}, "temperature": 1.0, "seed": 0}
    refused = post("/v1/completions", request)
    assert refused.status_code == 400
    assert "there is no remasking rule 'left_to_right'" in refused.json()["error"]["message"]
    monkeypatch.setenv("LLADA_PLUGINS", "toy_rules")
    load_plugins.cache_clear()
    try:
        reply = post("/v1/completions", request)
    finally:
        load_plugins.cache_clear()
    assert reply.status_code == 200
    drafts = [
        json.loads(line[6:])["draft"]["tokens"] for line in reply.text.splitlines() if '"draft"' in line
    ]
    assert all(tokens == sorted(tokens, key=lambda text: text is None) for tokens in drafts)
    assert None not in drafts[-1]


def test_the_collector_does_not_walk_over_what_was_loaded(small_model: Path) -> None:
    """A full pass over torch's and transformers' objects stops all streams for a fifth of a second."""
    gc.unfreeze()
    loaded = len(gc.get_objects())
    opened = Denoiser(str(small_model), SamplingConfig())
    assert len(gc.get_objects()) < loaded / 10
    opened.close()
    assert gc.get_freeze_count() == 0
