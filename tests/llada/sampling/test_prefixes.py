"""Prompts' beginnings run once for many rows: what they are, what they cost, and that nobody gets anything else for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.model.transformer import Transformer
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.forward import forward
from llada.sampling.generate import generate, infill
from llada.sampling.prefixes import PrefixStore, run_prefix
from llada.sampling.sampler import commit, plan

MakeModel = Callable[..., Transformer]
MASK = 22
PROMPTS = [[3, 4, 5, 6, 7], [3, 4, 5, 6, 9, 2], [], [8]]


def canvas_of(prompts: list[list[int]], config: SamplingConfig) -> Canvas:
    return Canvas.join([prompt_canvas([prompt], config, mask_id=MASK, seed=0) for prompt in prompts])


def walk(model: Transformer, canvas: Canvas, prefixes: PrefixStore | None = None) -> list[list[Tensor]]:
    """Of each row: its logits at all forwards."""
    out: list[list[Tensor]] = [[] for _ in range(len(canvas))]
    while (step := plan(canvas)) is not None:
        logits = forward(model, canvas, step, prefixes)
        for row, own in zip(step.rows.tolist(), logits.split(step.where.sum(1).tolist()), strict=True):
            out[row].append(own.clone())
        commit(canvas, step, logits)
    return out


@torch.no_grad()
@pytest.mark.parametrize("mode", [{}, {"cache": "dual"}, {"cache": "vicinity", "vicinity": 4}], ids=str)
@pytest.mark.parametrize("shared_prefix", [None, 4])
@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_logits_equal_the_slow_definition(
    make_model: MakeModel, naive_row: Any, mode: dict[str, Any], shared_prefix: int | None, depth: int
) -> None:
    """In the first layers the prefix has the keys and values, and then the stream, that it has with masks alone behind it."""
    model = make_model(3, num_layers=3)
    config = SamplingConfig(
        gen_length=8,
        block_length=3,
        cfg_scale=1.0,
        shared_depth=depth / 3 + 0.1 if depth < 3 else 1.0,
        shared_prefix=shared_prefix,
        **mode,
    )
    canvas = canvas_of(PROMPTS, config)
    rows = [(naive_row(model), naive_row(model)) for _ in PROMPTS]
    forwards, blocks = 0, [-1] * len(PROMPTS)
    while (step := plan(canvas)) is not None:
        logits = forward(model, canvas, step).split(step.where.sum(1).tolist())
        for row, where, own in zip(step.rows.tolist(), step.where, logits, strict=True):
            P, tokens = len(PROMPTS[row]), canvas.tokens[row].tolist()
            p = min(P, shared_prefix or P)
            block = (tokens.index(MASK) - P) // 3
            begin, end = P + 3 * block, min(P + 8, P + 3 * block + 3)
            fed = {
                None: range(P + 8),
                "dual": range(begin, end),
                "vicinity": range(max(0, begin - 4), min(P + 8, end + 4)),
            }[config.cache]
            if block != blocks[row] or (config.cache == "vicinity" and forwards < 4):
                fed = range(P + 8)
            blocks[row] = block
            one, two = rows[row]
            alone = naive_row(model)
            prefix = alone.embed(tokens[:p] + [MASK] * 8, range(p + 8))
            x = one.embed(tokens, [c for c in fed if c >= p])
            for number in range(3):
                if number < depth:
                    prefix = alone.run_layer(number, prefix, range(p + 8))
                    for c in range(p):
                        one.keys[number][c] = alone.keys[number][c]
                        one.values[number][c] = alone.values[number][c]
                if number == depth:
                    x |= {c: prefix[c] for c in fed if c < p}
                x = one.run_layer(number, x, range(P + 8))
            with_prompt = one.logits(x)
            without = two.forward([MASK] * P + tokens[P:], fed, range(P + 8))
            wanted = torch.stack(
                [2 * with_prompt[c] - without[c] for c in where.nonzero().flatten().tolist()]
            )
            torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-3)
        commit(canvas, step, torch.cat(logits))
        forwards += 1
    assert forwards == 8


def test_no_depth_is_exact_and_any_depth_is_a_row_s_own_business(make_model: MakeModel) -> None:
    model = make_model(1, num_layers=3)
    plain = SamplingConfig(gen_length=8, block_length=3)
    exact = walk(model, canvas_of(PROMPTS, plain))
    for depth in (0.3, 0.4, 1.0):
        config = SamplingConfig(gen_length=8, block_length=3, shared_depth=depth)
        prefixes = PrefixStore()
        together = walk(model, canvas_of(PROMPTS, config), prefixes)
        assert len(prefixes) == (0 if depth == 0.3 else 3)
        for row, prompt in enumerate(PROMPTS):
            (alone,) = walk(model, canvas_of([prompt], config))
            for one, two, three in zip(together[row], alone, exact[row], strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
                if depth == 0.3 or not prompt:
                    assert torch.equal(one, three)
            is_exact = torch.allclose(together[row][-1], exact[row][-1], rtol=1e-4, atol=1e-4)
            assert is_exact == (depth == 0.3 or not prompt)


def test_intervals_that_run_everything_are_none_beside_a_shared_prefix_too(make_model: MakeModel) -> None:
    model = make_model(1, num_layers=3)
    knobs: dict[str, Any] = {"gen_length": 8, "block_length": 3, "shared_depth": 0.4, "shared_prefix": 4}
    plain = SamplingConfig(**knobs)
    interval = SamplingConfig(**knobs, cache="interval", prompt_interval=1, response_interval=1)
    one, two = (canvas_of(PROMPTS, config) for config in (plain, interval))
    for own, other in zip(walk(model, one), walk(model, two), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert torch.equal(one.token_forwards, two.token_forwards)


def test_tokens_that_many_rows_share_are_fed_once(make_model: MakeModel) -> None:
    model = make_model(1, num_layers=4)
    prompts = [[*range(2, 18), 3], [*range(2, 18), 4], [*range(2, 18), 5]]
    knobs: dict[str, Any] = {"gen_length": 4, "block_length": 2, "cache": "dual"}
    out = generate(model, prompts, shared_depth=0.5, shared_prefix=16, **knobs)
    # A row feeds everything at each of its two blocks, in between the block alone. Half of the layers are spared the
    # prefix, but for the once that they run it with four masks behind it.
    whole = 3 * 2 * (21 + 2)
    assert generate(model, prompts, **knobs).token_forwards == whole
    assert out.token_forwards == whole - 3 * 2 * 16 // 2 + (16 + 4) // 2


def test_the_first_forward_of_a_shared_prompt_is_exact(make_model: MakeModel) -> None:
    """Where all of the prompt is shared, masks are what stands behind it."""
    model = make_model(1, num_layers=3)
    plain, shared = (SamplingConfig(gen_length=8, shared_depth=depth) for depth in (0.0, 0.7))
    exact, own = (walk(model, canvas_of(PROMPTS, config)) for config in (plain, shared))
    for one, two in zip(exact, own, strict=True):
        torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(exact[0][3], own[0][3], rtol=1e-4, atol=1e-4)


def test_a_gap_in_a_text_stays_within_the_context(make_model: MakeModel) -> None:
    """Behind the beginning of a text with gaps stand no more masks than the text is long."""
    model = make_model(1, max_length=10)
    text = torch.tensor([[3, 4, 5, MASK, 6, MASK, MASK, 7, 8, 9]])
    lengths = []
    original = model.embed.register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0])))
    out = infill(model, text, shared_depth=0.5)
    original.remove()
    assert not (out.sequences == MASK).any()
    assert max(lengths) == 10


@torch.no_grad()
def test_the_store_holds_what_was_used_last(make_model: MakeModel) -> None:
    model = make_model(0, num_layers=3)
    a, b, c = (torch.tensor([*ids, MASK, MASK]) for ids in ([3, 4, 5], [3, 4, 6], [4, 3, 5]))
    size = 3 * (2 * 2 * 12 + 24) * 4  # tokens · (two layers' keys and values + the stream) · float32
    store = PrefixStore(max_bytes=2 * size)
    prefix, run = store.get(model, a, 3, 2)
    assert (run, prefix.num_bytes, prefix.depth, prefix.length) == (5, size, 2, 3)
    tensors = [prefix.stream, *(t for layer in prefix.layers for t in layer)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == size
    assert store.get(model, a, 3, 2) == (prefix, 0)
    assert store.get(model, b, 3, 2)[1] == 5
    assert store.get(model, a, 3, 2)[1] == 0
    assert store.get(model, c, 3, 2)[1] == 5  # b was used longest ago
    assert (len(store), store.num_bytes) == (2, 2 * size)
    assert store.get(model, a, 3, 2)[1] == 0
    assert store.get(model, b, 3, 2)[1] == 5
    assert store.get(model, a, 3, 1)[0].depth == 1  # another depth is another prefix
    assert store.get(model, a, 2, 1)[0].length == 2  # and so is another length before the same masks
    assert store.get(model, a[:-1], 3, 1)[1] == 4  # and other masks
    long = torch.arange(2, 20)
    assert store.get(model, long, 18, 2)[1] == store.get(model, long, 18, 2)[1] == 18  # too large to be kept
    assert store.num_bytes <= store.max_bytes
    again = run_prefix(model, a, 3, 2)
    assert torch.equal(again.stream, prefix.stream)


@torch.no_grad()
def test_a_prefix_in_all_layers_is_the_dense_network_s(make_model: MakeModel) -> None:
    model, ids = make_model(0), torch.tensor([3, 4, 5, 9])
    logits = model.lm_head(model.norm(run_prefix(model, ids, 3, 2).stream))
    torch.testing.assert_close(logits, model(ids[None])[0, :3], rtol=1e-4, atol=1e-4)
