"""Every rule with every cache and knobs at random: what holds of each text, and that all ways to it give the same one."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.cache import CACHES
from llada.sampling.canvas import prompt_canvas
from llada.sampling.completions import complete_texts
from llada.sampling.config import SamplingConfig
from llada.sampling.engine import DenoiseEngine
from llada.sampling.events import Finished, Text
from llada.sampling.generate import generate, held_back
from llada.sampling.request import GenerateRequest
from llada.sampling.rules import RULE_OF_KNOB, RULES
from llada.sampling.sampler import denoise
from llada.sampling.text import text_ends, turn_end
from llada.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["The cat sat on the mat.", "Grüße, 你好 🙂!"] * 5, 290)
MASK, EOS = TOKENIZER.mask_token_id, TOKENIZER.eos_token_id
CONFIDENT: dict[str, Any] = {"confidence_eos_eot_inf": True}
RULE_SETTINGS: list[dict[str, Any]] = [
    {"remasking": "low_confidence"},
    {"remasking": "low_confidence", **CONFIDENT},
    {"remasking": "margin"},
    {"remasking": "random"},
    {"remasking": "leftmost"},
    {"remasking": "first_hitting"},
    {"remasking": "ancestral"},
    {"remasking": "ancestral", "schedule": "cosine", "stratified": True},
    {"remdm_cap": 0.3},
    {"p2_eta": 1.5},
    {"threshold": 0.3},
    {"factor": 1.0},
    {"entropy_bound": 2.0},
    {"error_bound": 0.5},
    {"leap_threshold": 0.3, "leap_anchor": 0.5, "leap_radius": 2},
]
CACHE_SETTINGS: list[dict[str, Any]] = [
    {},
    {"cache": "prefix"},
    {"cache": "dual"},
    {"cache": "dual", "refresh_every": 2},
    {"cache": "vicinity", "vicinity": 2},
    {"cache": "interval", "prompt_interval": 4, "response_interval": 3},
    {"suffix_window": 3},
    {"shared_depth": 0.5, "shared_prefix": 3},
]
CASES = [(rule, cache) for rule in RULE_SETTINGS for cache in CACHE_SETTINGS]


class WantsMasks(Transformer):
    """A network that finds the mask the likeliest token everywhere."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super().forward(*args, **kwargs)
        logits[..., MASK] = 1000.0
        return logits


def build_model() -> Transformer:
    model = WantsMasks(ModelConfig(290, 24, 2, 4, 40, 2, max_length=64, mask_token_id=MASK, eos_token_id=EOS))
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        model.lm_head.weight[EOS].mul_(1.5)
    return model.eval()


MODEL = build_model()
ENDS = text_ends(MODEL, TOKENIZER)


def random_case(number: int) -> tuple[list[int], SamplingConfig]:
    rule, cache = CASES[number]
    rng = random.Random(number)
    length, block_length = rng.randrange(1, 20), rng.randrange(1, 9)
    blocks = -(-length // block_length)
    knobs: dict[str, Any] = {"temperature": rng.choice([0.0, 0.7, 1.5]), **rule, **cache}
    if rng.random() < 0.3:
        knobs |= {"temperature": 1.0, **rng.choice([{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}])}
    if rng.random() < 0.3:
        knobs["forbidden"] = {"*": tuple(rng.sample(range(40, 290), 100))}
    elif "suffix_window" not in knobs and rng.random() < 0.5:
        knobs["fixed"] = {at: rng.randrange(40, 290) for at in rng.sample(range(length), length // 4)}
    config = SamplingConfig(
        gen_length=length,
        steps=rng.choice([None, blocks, max(blocks, length // 2), length + 3]),
        block_length=block_length,
        cfg_scale=rng.choice([0.0, 0.0, 1.5]),
        logits_eos_inf=rng.random() < 0.2,
        **knobs,
    )
    return [rng.randrange(40, 290) for _ in range(rng.randrange(1, 30))], config


def test_every_rule_and_every_cache_is_tried() -> None:
    named = {rule.get("remasking") for rule in RULE_SETTINGS}
    named |= {
        name
        for name in RULES
        if RULES[name] in [RULE_OF_KNOB[k] for r in RULE_SETTINGS for k in r if k in RULE_OF_KNOB]
    }
    assert {*RULES} <= named
    assert {*CACHES} <= {cache.get("cache") for cache in CACHE_SETTINGS}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_holds_of_every_walk(number: int) -> None:
    prompt, config = random_case(number)
    rng = random.Random(-number)
    suffix = [] if config.suffix_window is not None else [50] * rng.randrange(3)
    start, length = len(prompt), config.gen_length
    canvas = prompt_canvas(
        [prompt],
        config,
        mask_id=MASK,
        eos_id=ENDS,
        suffix=suffix,
        seed=[number],
        **held_back(config, ENDS, turn_end(TOKENIZER)),
    )
    fixed = config.fixed or {}
    bound = length - len(fixed) if config.steps is None else config.steps
    may_remask = canvas.rules[0].may_remask
    before = canvas.tokens.clone()
    for forwards, state in enumerate(denoise(MODEL, canvas), start=1):
        assert forwards <= bound
        assert state.forwards.tolist() == [forwards]
        if not may_remask:
            was_mask = before == MASK
            assert torch.equal(state.tokens[~was_mask], before[~was_mask])
            assert ((state.reveal_step == forwards - 1) & was_mask).any()
        before = state.tokens.clone()
    tokens = canvas.tokens[0].tolist()
    assert MASK not in tokens
    assert tokens[:start] == prompt
    assert tokens[start + length :] == suffix
    text = tokens[start : start + length]
    end = next((at for at, token in enumerate(text) if token in ENDS), length)
    assert set(text[end + 1 :]) <= {ENDS[0]}
    assert end > max(fixed, default=-1)
    assert all(text[at] == token for at, token in fixed.items())
    assert not set(text[:end]) & set((config.forbidden or {}).get("*", ())) - set(fixed.values())
    revealed = canvas.reveal_step[0, start : start + length].tolist()
    assert all((revealed[at] >= 0) == (at not in fixed and at <= end) for at in range(length))
    assert not config.logits_eos_inf or EOS not in text[: end + 1]


def test_all_ways_give_the_same_text() -> None:
    """`generate` for each request alone, the engine with all at once, and batch inference with two of a kind."""
    cases = [random_case(number) for number in range(len(CASES))]
    requests = [GenerateRequest(prompt, config, seed=i) for i, (prompt, config) in enumerate(cases)]
    engine = DenoiseEngine(MODEL, TOKENIZER, max_concurrent=12, max_tokens=200)

    async def serve() -> tuple[list[str], dict[int, Finished]]:
        texts, ends = [""] * len(requests), {}
        async for event in engine.stream(*requests):
            if isinstance(event, Text):
                texts[event.index] += event.text
            elif isinstance(event, Finished):
                ends[event.index] = event
        return texts, ends

    texts, ends = asyncio.run(serve())
    engine.close()
    for number, (prompt, config) in enumerate(cases):
        knobs = {name: getattr(config, name) for name in config.__dataclass_fields__}
        alone = generate(MODEL, [prompt], eos_id=ENDS, eot_id=turn_end(TOKENIZER), seed=[number], **knobs)
        tokens = alone.sequences[0, len(prompt) :].tolist()
        count = next((at for at, token in enumerate(tokens) if token in ENDS), len(tokens))
        wanted = TOKENIZER.decode(tokens[:count], skip_special_tokens=True), count
        assert (texts[number], ends[number].completion_tokens) == wanted, config
        assert ends[number].nfe <= alone.nfe
        words = TOKENIZER.decode(prompt)
        if TOKENIZER(words)["input_ids"] == prompt:
            both = complete_texts(MODEL, TOKENIZER, ["The", words], config, seed=[7, number])
            assert (both[1]["text"], both[1]["tokens"]) == wanted, config
