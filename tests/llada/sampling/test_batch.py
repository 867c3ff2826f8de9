"""Replies on one canvas: any company gives the same text, turns go by what was served, failures stay with their row."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llada.model.predict import Model
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.batch import Batch, Group, Progress, Run, cache_bytes
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.generate import generate
from llada.sampling.packed import MANY, PART
from llada.sampling.prefixes import PrefixStore
from llada.sampling.reply import Reply
from llada.sampling.sampler import advance
from llada.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["The cat sat on the mat."], 280)
MASK, EOS = TOKENIZER.mask_token_id, TOKENIZER.eos_token_id


def build_model() -> Transformer:
    config = ModelConfig(280, 24, 2, 4, 40, 2, max_length=64, mask_token_id=MASK, eos_token_id=EOS)
    model = Transformer(config)
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        model.lm_head.weight[EOS].mul_(1.5)
    return model.eval()


def lay_out(
    prompt: list[int], config: SamplingConfig, seed: int, group: Group | None = None
) -> tuple[Run, Canvas]:
    reply = Reply(
        TOKENIZER, start=len(prompt), length=config.gen_length, mask_id=MASK, end_ids=frozenset({EOS})
    )
    canvas = prompt_canvas([prompt], config, mask_id=MASK, eos_id=EOS, seed=[seed])
    return Run(reply, group or Group()), canvas


def turn(
    batch: Batch,
    model: Model,
    fail: Callable[[Run], object] | None = None,
    *,
    prefixes: PrefixStore | None = None,
    batch_invariant: bool = False,
) -> list[Progress]:
    """One forward, and what it did; `fail` is told whose failed alone, None raises."""
    step, brought_on = batch.plan(), []
    if step is not None:
        assert batch.canvas is not None
        tell = None if fail is None else lambda row, _: fail(batch.runs[row])
        brought_on = advance(model, batch.canvas, step, prefixes, batch_invariant=batch_invariant, fail=tell)
    return list(batch.progress(brought_on))


def random_config(rng: random.Random) -> SamplingConfig:
    length, block_length = rng.randrange(1, 20), rng.randrange(1, 9)
    blocks = -(-length // block_length)
    rule: dict[str, Any] = rng.choice(
        [
            {},
            {"remasking": "random"},
            {"remasking": "ancestral"},
            {"threshold": 0.3},
            {"factor": 1.0},
            {"entropy_bound": 2.0},
            {"error_bound": 0.5},
            {"remasking": "margin"},
            {"leap_threshold": 0.3, "leap_anchor": 0.5},
            {"remdm_cap": 0.3},
            {"p2_eta": 1.0},
        ]
    )
    cache: dict[str, Any] = rng.choice(
        [
            {},
            {"cache": "prefix"},
            {"cache": "dual"},
            {"cache": "dual", "refresh_every": 3},
            {"cache": "vicinity", "vicinity": 2},
            {"suffix_window": 3},
            {"cache": "interval", "prompt_interval": 4, "response_interval": 3},
            {"shared_depth": 0.5},
        ]
    )
    steps = rng.choice([None, blocks, min(blocks + 2, length), length])
    growth: dict[str, Any] = {}
    if "suffix_window" not in cache and rng.random() < 0.4:
        growth = {"initial_length": rng.randrange(1, 8), "expansion_length": 3, "eos_threshold": 0.1}
        if not {"remdm_cap", "p2_eta"} & rule.keys() and rule.get("remasking") != "ancestral":
            growth |= {"insert_below": 0.5}
            steps = None
    return SamplingConfig(
        gen_length=length,
        steps=steps,
        block_length=block_length,
        temperature=rng.choice([None, 0.0, 0.7, 1.5]),
        cfg_scale=rng.choice([0.0, 0.0, 1.5]),
        **rule,
        **cache,
        **growth,
    )


@pytest.mark.parametrize(
    ("dtype", "batch_invariant", "requests"),
    [
        (torch.float32, False, 60),
        (torch.bfloat16, True, 25),
        pytest.param(torch.float32, False, 300, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, True, 100, marks=pytest.mark.slow),
    ],
)
def test_any_company_gives_the_same_text(dtype: torch.dtype, batch_invariant: bool, requests: int) -> None:
    """Requests of all kinds that join and leave at random, under a small budget of tokens: token by token what
    `generate` gives each alone, after as many forwards."""
    rng, model = random.Random(0), build_model().to(dtype)
    cases = []
    for seed in range(requests):
        prompt = [rng.randrange(40, 280) for _ in range(rng.randrange(0, 30))]
        cases.append((prompt, random_config(rng), seed))
    batch, prefixes = Batch(max_tokens=150), PrefixStore()
    waiting, ended = list(enumerate(cases)), {}
    numbers: dict[Run, int] = {}
    while waiting or batch.runs:
        joining = [waiting.pop() for _ in range(min(len(waiting), rng.randrange(4), 16 - len(batch.runs)))]
        laid_out = [lay_out(*case) for _, case in joining]
        numbers.update({run: number for (run, _), (number, _) in zip(laid_out, joining, strict=True)})
        batch.add([run for run, _ in laid_out], [canvas for _, canvas in laid_out])
        for run, tokens, final_until, forwards, *_ in turn(
            batch, model, prefixes=prefixes, batch_invariant=batch_invariant
        ):
            run.reply.read(tokens, final_until)
            if run.reply.reason is not None:
                prompt, config, _ = cases[numbers[run]]
                begin = len(prompt)
                ended[numbers[run]] = (
                    tokens[begin : begin + run.reply.num_committed].tolist(),
                    forwards,
                    run.reply.reason,
                )
        batch.keep(lambda run: run.reply.reason is None)
    for number, (prompt, config, seed) in enumerate(cases):
        knobs = {name: getattr(config, name) for name in config.__dataclass_fields__}
        alone = generate(model, [prompt], eos_id=EOS, seed=[seed], batch_invariant=batch_invariant, **knobs)
        text = alone.sequences[0, len(prompt) :].tolist()
        # Behind a canvas that has grown no further stands EOS, too.
        reason = "stop" if EOS in text else "length"
        text = text[: text.index(EOS)] if EOS in text else text
        assert ended[number][0] == text, (number, config)
        assert ended[number][1] <= alone.nfe
        assert ended[number][2] == reason


def test_turns_go_round_between_groups() -> None:
    """One row against sixteen of another group, room for three: it is in every forward, the sixteen take turns."""
    model = build_model()
    config = SamplingConfig(gen_length=12, block_length=12)
    one, many = Group(), Group()
    rows = [lay_out([50, 60, 70], config, seed, many) for seed in range(16)]
    rows.append(lay_out([50, 60, 70], config, 99, one))
    batch = Batch(max_tokens=3 * 15)
    batch.add([run for run, _ in rows], [canvas for _, canvas in rows])
    for number in range(8):
        moved = [progress.run for progress in turn(batch, model)]
        assert len(moved) == 3
        assert rows[-1][0] in moved, number
    others = [run.served for run, _ in rows[:16]]
    assert max(others) - min(others) <= 15
    assert one.on_canvas == 1
    assert many.on_canvas == 16


def test_the_higher_priority_goes_first() -> None:
    config = SamplingConfig(gen_length=12, block_length=12)
    groups = [Group(0), Group(2), Group(0)]
    rows = [lay_out([50], config, seed, group) for seed, group in enumerate(groups)]
    batch, model = Batch(max_tokens=13), build_model()
    batch.add([run for run, _ in rows], [canvas for _, canvas in rows])
    assert [[progress.run for progress in turn(batch, model)] for _ in range(5)] == [[rows[1][0]]] * 5


def test_who_comes_late_does_not_catch_up() -> None:
    """A place for one row: whoever comes when others have had much shares the forwards with them from then on, and so does
    a group whose rows come one after the other."""
    config = SamplingConfig(gen_length=20, block_length=20)
    groups = [Group(), Group(), Group()]
    rows = [lay_out([50], config, seed, group) for seed, group in enumerate([*groups, groups[2]])]
    batch, model = Batch(max_tokens=21), build_model()

    def add(*numbers: int) -> None:
        batch.add([rows[n][0] for n in numbers], [rows[n][1] for n in numbers])

    def turns(number: int) -> list[int]:
        moved = [progress.run for _ in range(number) for progress in turn(batch, model)]
        return [[run for run, _ in rows].index(run) for run in moved]

    add(0, 1)
    assert turns(8).count(0) == 4
    add(2)
    assert sorted(turns(6)) == [0, 0, 1, 1, 2, 2]
    add(3)
    assert sorted(turns(12)) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3]


def test_guidance_counts_twice() -> None:
    config = SamplingConfig(gen_length=12, block_length=12, cfg_scale=1.0)
    rows = [lay_out([50], config, seed) for seed in range(4)]
    batch, model = Batch(max_tokens=4 * 13), build_model()
    batch.add([run for run, _ in rows], [canvas for _, canvas in rows])
    assert [len(turn(batch, model)) for _ in range(3)] == [2, 2, 2]


def test_a_row_larger_than_the_budget_is_fed_alone() -> None:
    rows = [lay_out([50] * 20, SamplingConfig(gen_length=4), seed) for seed in range(2)]
    batch, model = Batch(max_tokens=5), build_model()
    batch.add([run for run, _ in rows], [canvas for _, canvas in rows])
    assert [len(turn(batch, model)) for _ in range(3)] == [1, 1, 1]


def test_a_failure_stays_with_its_row() -> None:
    """The forward of all fails, then each row is tried alone: the others come on as if nothing had been."""
    model = build_model()

    class Fragile(Transformer):
        def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if bool((input_ids == 77).any()):
                raise ValueError("the poisoned token")
            return super().forward(input_ids, *args, **kwargs)

    fragile = Fragile(model.config).eval()
    fragile.load_state_dict(model.state_dict())
    config = SamplingConfig(gen_length=6, block_length=3, cache="dual")
    rows = [lay_out([50, token], config, seed) for seed, token in enumerate((60, 77, 61))]
    batch = Batch(max_tokens=1000)
    batch.add([run for run, _ in rows], [canvas for _, canvas in rows])
    failed: list[Run] = []
    texts: dict[Run, list[int]] = {}
    while batch.runs:
        for run, tokens, *_ in turn(batch, fragile, failed.append):
            run.reply.read(tokens)
            texts[run] = tokens[2:8].tolist()
        batch.keep(lambda run: run.reply.reason is None and run not in failed)
    assert failed == [rows[1][0]]
    for seed, token in ((0, 60), (2, 61)):
        alone = generate(
            model, [[50, token]], gen_length=6, block_length=3, cache="dual", eos_id=EOS, seed=[seed]
        )
        text = alone.sequences[0, 2:].tolist()
        end = text.index(EOS) if EOS in text else 6
        assert texts[rows[seed][0]][:end] == text[:end]


def test_logits_that_are_no_numbers_cost_the_others_no_forward() -> None:
    """They are committed from the forward that was; a cache by intervals would give something else in another one."""
    model = build_model()
    forwards = 0

    def spoil(_: Any, inputs: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        nonlocal forwards
        forwards += 1
        return out.masked_fill((inputs[0] == 77)[..., None], torch.nan)

    config = SamplingConfig(
        gen_length=12,
        block_length=4,
        cache="interval",
        prompt_interval=3,
        response_interval=50,
        refresh_share=0.4,
        forbidden={"*": (77, EOS)},
    )
    rows = [lay_out([50, token], config, seed) for seed, token in enumerate((60, 61))]
    batch = Batch(max_tokens=1000)
    batch.add([run for run, _ in rows], [canvas for _, canvas in rows])
    poisoned = [lay_out([77], config, seed) for seed in range(5)]
    failed: list[Run] = []
    hook = model.embed.register_forward_hook(spoil)
    while any(run.reply.reason is None for run, _ in rows):
        if poisoned and forwards % 2:
            run, canvas = poisoned.pop()
            batch.add([run], [canvas])
        for run, tokens, *_ in turn(batch, model, failed.append):
            run.reply.read(tokens)
            if run.reply.reason is not None:
                seed = [other for other, _ in rows].index(run)
                alone = generate(
                    model,
                    [[50, 60 + seed]],
                    seed=[seed],
                    eos_id=EOS,
                    **{name: getattr(config, name) for name in config.__dataclass_fields__},
                )
                forwards -= alone.nfe
                assert tokens[:14].tolist() == alone.sequences[0].tolist()
        batch.keep(lambda run: run.reply.reason is None and run not in failed)
    hook.remove()
    assert len(failed) == 5
    assert forwards == 12


def test_the_bytes_of_a_cache_are_counted() -> None:
    model = build_model()
    per_token = 2 * 2 * 2 * 6 * 4  # layers, keys and values, heads, their width, bytes
    assert cache_bytes(model, SamplingConfig(cache="dual"), 10) == 10 * per_token
    assert cache_bytes(model, SamplingConfig(cache="dual", cfg_scale=1.0), 10) == 20 * per_token
    assert cache_bytes(model, SamplingConfig(), 10) == 0
    blocks = Transformer(dataclasses.replace(model.config, block_length=4))
    assert cache_bytes(blocks, SamplingConfig(), 10) == 10 * per_token


@pytest.mark.parametrize("cache", [None, "dual"])
def test_more_tokens_than_go_through_a_product_at_once(cache: str | None) -> None:
    """Products of so many run in parts on a CPU (packed.py): rows that a part begins or ends in get their text too."""
    model, rng = build_model(), random.Random(0)
    prompts = [[rng.randrange(1, 270) for _ in range(rng.randrange(20, 44))] for _ in range(40)]
    knobs: dict[str, Any] = {
        "gen_length": 20,
        "block_length": 7,
        "threshold": 0.3,
        "cache": cache,
        "eos_id": EOS,
    }
    assert sum(len(prompt) + 20 for prompt in prompts) > MANY + PART
    seeds = list(range(40))
    together = generate(model, prompts, seed=seeds, **knobs).sequences[:, -20:]
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], seed=[row], **knobs).sequences[0, -20:]
        assert torch.equal(alone, together[row]), row
