"""Replies on one canvas: any company gives the same text, turns go by what was served, failures stay with their row."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.batch import Batch, Group, Run, cache_bytes
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.generate import generate
from llada.sampling.reply import Reply
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


def fail(run: Run, error: Exception) -> None:
    raise error


def random_config(rng: random.Random) -> SamplingConfig:
    length = rng.randrange(1, 20)
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
    return SamplingConfig(
        gen_length=length,
        steps=rng.choice([None, 1, 3, length]),
        block_length=rng.randrange(1, 9),
        temperature=rng.choice([None, 0.0, 0.7, 1.5]),
        cfg_scale=rng.choice([0.0, 0.0, 1.5]),
        **rule,
        **cache,
    )


@pytest.mark.parametrize(("dtype", "batch_invariant"), [(torch.float32, False), (torch.bfloat16, True)])
def test_any_company_gives_the_same_text(dtype: torch.dtype, batch_invariant: bool) -> None:
    """300 requests of all kinds that join and leave at random, under a small budget of tokens: token by token what
    `generate` gives each alone, after as many forwards."""
    rng, model = random.Random(0), build_model().to(dtype)
    cases = []
    for seed in range(300):
        prompt = [rng.randrange(40, 280) for _ in range(rng.randrange(0, 30))]
        cases.append((prompt, random_config(rng), seed))
    batch = Batch(model, max_tokens=150, batch_invariant=batch_invariant)
    waiting, ended = list(enumerate(cases)), {}
    numbers: dict[Run, int] = {}
    while waiting or batch.runs:
        joining = [waiting.pop() for _ in range(min(len(waiting), rng.randrange(4), 16 - len(batch.runs)))]
        laid_out = [lay_out(*case) for _, case in joining]
        numbers.update({run: number for (run, _), (number, _) in zip(laid_out, joining, strict=True)})
        batch.add([run for run, _ in laid_out], [canvas for _, canvas in laid_out])
        for run, tokens, final_until, forwards in batch.turn(fail):
            run.reply.read(tokens, final_until)
            if run.reply.reason is not None:
                prompt, config, _ = cases[numbers[run]]
                begin = len(prompt)
                ended[numbers[run]] = (tokens[begin : begin + run.reply.num_committed].tolist(), forwards)
        batch.keep(lambda run: run.reply.reason is None)
    for number, (prompt, config, seed) in enumerate(cases):
        knobs = {name: getattr(config, name) for name in config.__dataclass_fields__}
        alone = generate(model, [prompt], eos_id=EOS, seed=[seed], batch_invariant=batch_invariant, **knobs)
        text = alone.sequences[0, len(prompt) :].tolist()
        text = text[: text.index(EOS)] if EOS in text else text
        assert ended[number][0] == text, (number, config)
        assert ended[number][1] <= alone.nfe


def test_turns_go_round_between_groups() -> None:
    """One row against sixteen of another group, room for three: it is in every forward, the sixteen take turns."""
    model = build_model()
    config = SamplingConfig(gen_length=12, block_length=12)
    one, many = Group(), Group()
    rows = [lay_out([50, 60, 70], config, seed, many) for seed in range(16)]
    rows.append(lay_out([50, 60, 70], config, 99, one))
    batch = Batch(model, max_tokens=3 * 15)
    batch.add([run for run, _ in rows], [canvas for _, canvas in rows])
    for turn in range(8):
        moved = [progress.run for progress in batch.turn(fail)]
        assert len(moved) == 3
        assert rows[-1][0] in moved, turn
    others = [run.served for run, _ in rows[:16]]
    assert max(others) - min(others) <= 15
    assert one.on_canvas == 1
    assert many.on_canvas == 16


def test_the_higher_priority_goes_first() -> None:
    config = SamplingConfig(gen_length=12, block_length=12)
    groups = [Group(0), Group(2), Group(0)]
    rows = [lay_out([50], config, seed, group) for seed, group in enumerate(groups)]
    batch = Batch(build_model(), max_tokens=13)
    batch.add([run for run, _ in rows], [canvas for _, canvas in rows])
    assert [[progress.run for progress in batch.turn(fail)] for _ in range(5)] == [[rows[1][0]]] * 5


def test_a_row_larger_than_the_budget_is_fed_alone() -> None:
    rows = [lay_out([50] * 20, SamplingConfig(gen_length=4), seed) for seed in range(2)]
    batch = Batch(build_model(), max_tokens=5)
    batch.add([run for run, _ in rows], [canvas for _, canvas in rows])
    assert [len(list(batch.turn(fail))) for _ in range(3)] == [1, 1, 1]


def test_a_failure_stays_with_its_row() -> None:
    """The forward of all fails, then each row is tried alone: the others come on as if nothing had been."""
    model = build_model()

    class Fragile(Transformer):
        def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if bool((input_ids == 77).any()):
                raise ValueError("the poisoned token")
            return super().forward(input_ids, *args, **kwargs)

    fragile = Fragile(model.config)
    fragile.load_state_dict(model.state_dict())
    config = SamplingConfig(gen_length=6, block_length=3, cache="dual")
    rows = [lay_out([50, token], config, seed) for seed, token in enumerate((60, 77, 61))]
    batch = Batch(fragile.eval(), max_tokens=1000)
    batch.add([run for run, _ in rows], [canvas for _, canvas in rows])
    failed: list[Run] = []
    texts: dict[Run, list[int]] = {}
    while batch.runs:
        for run, tokens, *_ in batch.turn(lambda run, error: failed.append(run)):
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


def test_the_bytes_of_a_cache_are_counted() -> None:
    model = build_model()
    per_token = 2 * 2 * 2 * 6 * 4  # layers, keys and values, heads, their width, bytes
    assert cache_bytes(model, SamplingConfig(cache="dual"), 10) == 10 * per_token
    assert cache_bytes(model, SamplingConfig(cache="dual", cfg_scale=1.0), 10) == 20 * per_token
    assert cache_bytes(model, SamplingConfig(), 10) == 0
    blocks = Transformer(dataclasses.replace(model.config, block_length=4))
    assert cache_bytes(blocks, SamplingConfig(), 10) == 10 * per_token
