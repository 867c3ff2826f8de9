"""Caches: the same logits as the slow definitions, exact where everything is fed, and a row's own business in any company."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling import cache
from llada.sampling.cache import CACHES, OF_SOME_CACHES, KeyValues, row_bytes
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.forward import forward
from llada.sampling.generate import generate
from llada.sampling.prefixes import PrefixStore
from llada.sampling.sampler import advance, commit, denoise, plan

MakeModel = Callable[..., Transformer]
MASK, EOS = 22, 1
MODES: list[dict[str, Any]] = [
    {"cache": "prefix"},
    {"cache": "dual"},
    {"cache": "vicinity", "vicinity": 2},
    {"cache": "prefix", "refresh_every": 3},
    {"cache": "dual", "refresh_every": 2},
    {"cache": "dual", "suffix_window": 3},
    {"suffix_window": 2},
]
INTERVALS: list[dict[str, Any]] = [
    {"cache": "interval", "prompt_interval": p, "response_interval": r, "refresh_share": share}
    for p, r, share in [(4, 2, 0.0), (3, 4, 0.4), (2, 50, 0.3), (50, 50, 0.25), (1, 3, 1.0)]
]


def request(seed: int, **changes: Any) -> tuple[list[int], SamplingConfig, int]:
    """A prompt, settings, and a seed."""
    choose = random.Random(seed)
    rule = choose.choice([{}, {"remasking": "random"}, {"threshold": 0.3}, {"entropy_bound": 0.8}])
    knobs = {
        "gen_length": choose.randint(1, 16),
        "block_length": choose.choice([2, 3, 5, 8, 16]),
        "temperature": choose.choice([0.0, 0.0, 0.8]),
        "cfg_scale": choose.choice([0.0, 0.0, 1.0]),
        **rule,
        **choose.choice([{}, *MODES, *INTERVALS, {**INTERVALS[1], "suffix_window": 4}]),
        **choose.choice([{}, {}, {"shared_depth": 0.5}, {"shared_depth": 0.5, "shared_prefix": 3}]),
        **changes,
    }
    prompt = [choose.choice([3, 4])] * 4 + [choose.randrange(2, MASK) for _ in range(choose.randint(0, 6))]
    return prompt[choose.choice([0, 0, 4]) :], SamplingConfig(**knobs), seed


def canvas_of(prompt: list[int], config: SamplingConfig, seed: int, eos_id: int | None = EOS) -> Canvas:
    return prompt_canvas([prompt], config, mask_id=MASK, seed=[seed], eos_id=eos_id)


def walk(model: Transformer, canvas: Canvas) -> tuple[list[list[int]], list[list[int]], list[Tensor]]:
    """Tokens, reveal steps, and the logits of all forwards."""
    seen = []
    while (step := plan(canvas)) is not None:
        logits = forward(model, canvas, step)
        seen.append(logits.clone())
        commit(canvas, step, logits)
    return canvas.tokens.tolist(), canvas.reveal_step.tolist(), seen


ALWAYS: list[dict[str, Any]] = [
    *({"cache": mode, "refresh_every": 1} for mode in ("prefix", "dual", "vicinity")),
    {"cache": "interval", "prompt_interval": 1, "response_interval": 1, "refresh_share": 0.0},
]


@pytest.mark.parametrize("mode", ALWAYS, ids=str)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_with_everything_fed_a_cache_is_none_bit_for_bit(
    make_model: MakeModel, mode: dict[str, Any], cfg_scale: float
) -> None:
    model = make_model(1)
    prompts = [[3, 4, 5, 6], [7], [], [9, 8, 7, 6, 5, 4, 3]]
    config = SamplingConfig(gen_length=13, block_length=5, threshold=0.4, cfg_scale=cfg_scale)
    exact = replace(config, **mode)
    for rows in [*([prompt] for prompt in prompts), prompts]:
        plain, cached = (prompt_canvas(rows, c, mask_id=MASK, seed=0, eos_id=EOS) for c in (config, exact))
        plain_out, cached_out = walk(model, plain), walk(model, cached)
        assert plain_out[:2] == cached_out[:2]
        assert all(torch.equal(a, b) for a, b in zip(plain_out[2], cached_out[2], strict=True))
        assert torch.equal(plain.token_forwards, cached.token_forwards)


def test_a_window_over_everything_is_none(make_model: MakeModel) -> None:
    model = make_model(1)
    for mode in (None, "dual"):
        config = SamplingConfig(gen_length=13, block_length=4, cache=mode)
        wide, narrow = (replace(config, suffix_window=w) for w in (9, 8))
        tokens = [canvas_of([3, 4], c, 0, None) for c in (config, wide, narrow)]
        out = [walk(model, canvas) for canvas in tokens]
        assert all(torch.equal(a, b) for a, b in zip(out[0][2], out[1][2], strict=True))
        assert not torch.equal(out[0][2][0], out[2][2][0])


@torch.no_grad()
@pytest.mark.parametrize("mode", [{}, *MODES], ids=str)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_logits_equal_the_slow_definition(
    make_model: MakeModel, naive_row: Any, mode: dict[str, Any], cfg_scale: float
) -> None:
    """Rows of other prompts in one canvas, each against a row that is run column by column."""
    model = make_model(3)
    prompts = [[3, 4, 5], [], [6, 7, 8, 9, 2, 3]]
    config = SamplingConfig(gen_length=11, block_length=4, cfg_scale=cfg_scale, **mode)
    canvas = Canvas.join([canvas_of(prompt, config, row) for row, prompt in enumerate(prompts)])
    naive = [(naive_row(model), naive_row(model)) for _ in prompts]
    state = [{"block": -1, "step": 0, "forwards": 0, "fed": 0} for _ in prompts]
    seen_end = [len(prompt) + config.gen_length for prompt in prompts]
    while (step := plan(canvas)) is not None:
        logits = forward(model, canvas, step).split(step.where.sum(1).tolist())
        for row, where, own in zip(step.rows.tolist(), step.where, logits, strict=True):
            P, note = len(prompts[row]), state[row]
            tokens = canvas.tokens[row].tolist()
            if EOS in tokens[P:]:
                seen_end[row] = P + tokens[P:].index(EOS) + 1
            block = (tokens.index(MASK) - P) // config.block_length
            begin, end = P + block * config.block_length, P + (block + 1) * config.block_length
            last = seen_end[row]
            if config.suffix_window is not None:
                last = min(last, end + config.suffix_window)
            end = min(end, last)
            note["step"] = 0 if block != note["block"] else note["step"] + 1
            note["block"] = block
            fed = {
                None: range(last),
                "prefix": range(begin, last),
                "dual": range(begin, end),
                "vicinity": range(max(0, begin - config.vicinity), min(last, end + config.vicinity)),
            }[config.cache]
            is_due = config.refresh_every is not None and note["step"] % config.refresh_every == 0
            is_warm = config.cache == "vicinity" and note["forwards"] < 4
            if note["step"] == 0 or is_due or is_warm:
                fed = range(last)
            expected = naive[row][0].forward(tokens, fed, range(last))
            if cfg_scale:
                hidden = [MASK] * P + tokens[P:]
                without = naive[row][1].forward(hidden, fed, range(last))
                expected = {c: without[c] + (1 + cfg_scale) * (expected[c] - without[c]) for c in fed}
            note["forwards"] += 1
            note["fed"] += len(fed) * (2 if cfg_scale else 1)
            assert int(canvas.token_forwards[row]) == note["fed"]
            wanted = torch.stack([expected[c] for c in where.nonzero().flatten().tolist()])
            torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-3)
        commit(canvas, step, torch.cat(logits))
    assert all(note["forwards"] for note in state)


class NaiveIntervals:
    """dLLM-Cache by its paper: what attention and what the MLP gave are kept apart, the token that changed most is looked for."""

    def __init__(self, row: Any) -> None:
        self.row = row
        layers = range(row.model.config.num_layers)
        self.attended: list[dict[int, Tensor]] = [{} for _ in layers]
        self.mlp: list[dict[int, Tensor]] = [{} for _ in layers]
        self.runs = 0

    def forward(
        self, tokens: list[int], prompt: range, response: range, forwards: int, config: SamplingConfig
    ) -> dict[int, Tensor]:
        row, seen = self.row, [*prompt, *response]
        x = row.embed(tokens, seen)
        for number in range(row.model.config.num_layers):
            run = list(prompt) if number == 0 or forwards % config.prompt_interval == 0 else []
            if number == 0 or forwards % config.response_interval == 0:
                run += response
            elif config.refresh_share:
                keys, values = dict(row.keys[number]), dict(row.values[number])
                row.keep(number, {c: x[c] for c in response})
                row.keys[number] = keys
                cosine = {
                    c: float(torch.cosine_similarity(values[c].flatten(), row.values[number][c].flatten(), 0))
                    for c in response
                }
                run += sorted(response, key=cosine.__getitem__)[: int(len(response) * config.refresh_share)]
            self.runs += len(run)
            row.keep(number, {c: x[c] for c in run})
            self.attended[number].update(row.attended(number, {c: x[c] for c in run}, seen))
            x = {c: h + self.attended[number][c] for c, h in x.items()}
            self.mlp[number].update(row.mlp(number, {c: x[c] for c in run}))
            x = {c: h + self.mlp[number][c] for c, h in x.items()}
        return row.logits(x)


@torch.no_grad()
@pytest.mark.parametrize("mode", INTERVALS, ids=str)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_intervals_equal_the_slow_definition(
    make_model: MakeModel, naive_row: Any, mode: dict[str, Any], cfg_scale: float
) -> None:
    """Beside rows of other modes; the intervals run on through the blocks."""
    model = make_model(3, num_layers=3)
    prompts = [[3, 4, 5], [], [6, 7, 8, 9, 2, 3], [5, 6]]
    config = SamplingConfig(gen_length=10, block_length=4, cfg_scale=cfg_scale, **mode)
    configs = [config, config, config, SamplingConfig(gen_length=8, block_length=3, cache="dual")]
    canvas = Canvas.join(
        [canvas_of(p, c, row, None) for row, (p, c) in enumerate(zip(prompts, configs, strict=True))]
    )
    naive = [(NaiveIntervals(naive_row(model)), NaiveIntervals(naive_row(model))) for _ in prompts[:3]]
    forwards, fed = 0, [0] * 3
    while (step := plan(canvas)) is not None:
        logits = forward(model, canvas, step).split(step.where.sum(1).tolist())
        for row, where, own in zip(step.rows.tolist(), step.where, logits, strict=True):
            if row == 3:
                continue
            P, tokens = len(prompts[row]), canvas.tokens[row].tolist()
            columns = range(P), range(P, P + 10)
            one, two = naive[row]
            before = one.runs
            expected = one.forward(tokens, *columns, forwards, config)
            fed[row] += -(-(one.runs - before) // 3) * (2 if cfg_scale else 1)
            if cfg_scale:
                without = two.forward([MASK] * P + tokens[P:], *columns, forwards, config)
                expected = {c: without[c] + (1 + cfg_scale) * (expected[c] - without[c]) for c in expected}
            wanted = torch.stack([expected[c] for c in where.nonzero().flatten().tolist()])
            torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-3)
        commit(canvas, step, torch.cat(logits))
        forwards += 1
    assert forwards == 10
    assert canvas.token_forwards[:3].tolist() == fed


def test_intervals_run_less_than_everything(make_model: MakeModel) -> None:
    knobs: dict[str, Any] = {"gen_length": 16, "block_length": 16}
    prompt = [[3, 4, 5, 6] * 6]
    for share, at_most in ((0.0, 2), (0.25, 1.6)):
        out = generate(make_model(num_layers=4), prompt, cache="interval", refresh_share=share, **knobs)
        assert out.token_forwards * at_most < 16 * 40


@pytest.mark.parametrize("rows", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_requests_of_all_modes_together_equal_each_alone(make_model: MakeModel, rows: int) -> None:
    """Rows that come and go as a slot is free, of other lengths, blocks, rules, caches, with and without guidance; some
    share their prompt's beginning with whoever has the same, in a store that holds two of them."""
    model = make_model(5)
    requests = [request(seed) for seed in range(rows)]
    assert len({one[1].cache for one in requests}) > 3
    alone, fed = [], []
    for one in requests:
        canvas = canvas_of(*one)
        for _ in denoise(model, canvas):
            pass
        alone.append((canvas.tokens[0].tolist(), canvas.reveal_step[0].tolist()))
        fed.append(int(canvas.token_forwards[0]))
    waiting = list(range(rows))
    random.Random(0).shuffle(waiting)
    order: list[int] = []
    canvas, together, fed_together = None, {}, {}
    prefixes = PrefixStore(max_bytes=2 * 5 * 96 * 4)
    while waiting or order:
        joining, waiting = waiting[: 12 - len(order)], waiting[12 - len(order) :]
        joined = [canvas_of(*requests[one]) for one in joining]
        canvas = Canvas.join([*([canvas] if canvas else []), *joined]) if joined else canvas
        order += joining
        assert canvas is not None
        step = plan(canvas)
        if step is not None:
            advance(model, canvas, step, prefixes)
        at_work = ((canvas.tokens == MASK) & canvas.attended).any(1).tolist()
        done = [row for row, works in enumerate(at_work) if not works]
        finished = canvas.take(done)
        finished.close_texts()
        for place, row in enumerate(done):
            own = finished.attended[place]
            together[order[row]] = (
                finished.tokens[place, own].tolist(),
                finished.reveal_step[place, own].tolist(),
            )
            fed_together[order[row]] = int(finished.token_forwards[place])
        kept = [row for row, works in enumerate(at_work) if works]
        canvas, order = canvas.take(kept), [order[row] for row in kept]
    for one in range(rows):
        assert together[one] == alone[one], requests[one]
        assert requests[one][1].shared_depth or fed_together[one] == fed[one]
    assert 0 < prefixes.num_bytes <= prefixes.max_bytes


@pytest.mark.parametrize("mode", [{}, *MODES, INTERVALS[0]], ids=str)
def test_a_forward_may_be_run_again(make_model: MakeModel, mode: dict[str, Any]) -> None:
    """A step whose commit failed for the sake of another row is tried again, and gets the same."""
    model = make_model(0)
    config = SamplingConfig(gen_length=9, block_length=4, cfg_scale=1.0, **mode)
    once, twice = canvas_of([3, 4, 5], config, 0), canvas_of([3, 4, 5], config, 0)
    while (step := plan(once)) is not None:
        plan(twice)
        expected = forward(model, once, step)
        forward(model, twice, step)
        again = forward(model, twice, step)
        assert torch.equal(again, expected)
        commit(once, step, expected)
        commit(twice, step, again)


@pytest.mark.parametrize("mode", ["prefix", "dual", "vicinity"])
def test_a_row_shrinks_at_its_end(make_model: MakeModel, mode: str) -> None:
    """What stands behind an end token is neither fed nor seen any more."""
    model = make_model(0)
    config = SamplingConfig(gen_length=12, block_length=6, cache=mode, refresh_every=1)
    canvas = canvas_of([3, 4], config, 0)
    step = plan(canvas)
    assert step is not None
    advance(model, canvas, step)
    canvas.tokens[0, 5] = EOS
    canvas.tokens[0, 6:] = EOS
    canvas.shorten(torch.tensor([0]), torch.tensor([5]))
    before = int(canvas.token_forwards[0])
    step = plan(canvas)
    assert step is not None
    logits = forward(model, canvas, step)
    assert int(canvas.token_forwards[0]) - before == 6
    short = model(canvas.tokens[:, :6], logits_at=step.where[:, :6])
    torch.testing.assert_close(logits, short, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("mode", [{"cache": "dual"}, INTERVALS[1]], ids=str)
def test_the_bytes_of_a_row_are_those_allocated(
    make_model: MakeModel, cfg_scale: float, mode: dict[str, Any]
) -> None:
    model = make_model(0, num_layers=3)
    long = canvas_of([3] * 20, SamplingConfig(gen_length=4), 0)
    config = SamplingConfig(gen_length=7, block_length=3, cfg_scale=cfg_scale, **mode)
    canvas = Canvas.join([long, canvas_of([3, 4], config, 1)])
    for _ in denoise(model, canvas):
        pass
    assert not canvas.caches[0].stores
    stores = canvas.caches[1].stores
    assert len(stores) == (2 if cfg_scale else 1)
    tensors = [t for store in stores for layer in store._layers for t in layer]
    tensors += [t for store in stores for t in store._added.values()]
    allocated = sum(t.untyped_storage().nbytes() for t in tensors)
    assert allocated == row_bytes(config, model.config, 9, 4)
    assert row_bytes(SamplingConfig(), model.config, 9, 4) == 0


@pytest.mark.parametrize("mode", ["prefix", "dual", "vicinity", "interval"])
def test_a_network_that_cannot_keep_anything_refuses_a_cache(make_model: MakeModel, mode: str) -> None:
    knobs: dict[str, Any] = {"gen_length": 4, "block_length": 2}
    plain = make_model(0)
    for knob in ({"cache": mode}, {"suffix_window": 3}, {"shared_depth": 0.5}):
        with pytest.raises(UserError, match="need a network of ours"):
            generate(lambda tokens: plain(tokens), [[3]], mask_id=MASK, **knob, **knobs)


def test_bytes_count_the_key_value_heads() -> None:
    config = ModelConfig(vocab_size=8, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=8)
    assert KeyValues.num_bytes(config, 10, 2) == 2 * 3 * 10 * 2 * 8 * 2


def test_the_table_for_readers_names_every_mode_and_knob() -> None:
    table = (cache.__doc__ or "").split("\n\n")[1]
    modes = [line.split()[0] for line in table.splitlines()[1:] if line[4] != " "]
    assert [name for name in modes if name != "any,"] == list(CACHES)
    assert all(name in table for name in OF_SOME_CACHES)
