"""Steps of blocks; and a block-causal network's blocks: kept exactly, against whole rows without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada.errors import UserError
from llada.model.transformer import Transformer
from llada.sampling.blocks import settled_columns, share_steps
from llada.sampling.cache import RowCache, Stretch
from llada.sampling.canvas import Canvas, Step, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.forward import forward
from llada.sampling.generate import generate, infill
from llada.sampling.rounds import generate_rounds
from llada.sampling.sampler import commit, denoise, plan

MakeModel = Callable[..., Transformer]
MASK, EOS, BLOCK = 22, 1, 4
RULES: list[dict[str, Any]] = [{}, {"threshold": 0.4}, {"remasking": "ancestral"}, {"temperature": 0.8}]


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=4), st.integers(1, 30)
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_steps_go_to_blocks_with_masks_alone(masks_in: list[list[int]], steps: int) -> None:
    most = max(sum(count > 0 for count in masks) for masks in masks_in)
    if steps < most:
        with pytest.raises(UserError, match=f"steps={steps} is too few for {most} blocks.*at least {most}"):
            share_steps(torch.tensor(masks_in), steps)
        return
    shared = share_steps(torch.tensor(masks_in), steps)
    for masks, row in zip(masks_in, shared.tolist(), strict=True):
        own = [n for n, count in zip(row, masks, strict=True) if count]
        assert all(n == 0 for n, count in zip(row, masks, strict=True) if not count)
        assert own == sorted(own, reverse=True)  # the first ones longer
        if own:
            assert sum(own) == steps
            assert own[0] - own[-1] <= 1
            assert own[-1] >= 1


def test_without_steps_a_block_has_as_many_as_masks() -> None:
    assert share_steps(torch.tensor([[3, 0, 2]]), None).tolist() == [[3, 0, 2]]


@torch.no_grad()
def whole_rows(model: Transformer, canvas: Canvas, step: Step) -> Tensor:
    """What `forward` gives, from each whole row alone: nothing kept, and all masks behind the block fed."""
    pieces = []
    for row, where in zip(step.rows.tolist(), step.where, strict=True):
        columns = slice(int(canvas.first[row]), int(canvas.stop[row]))
        tokens, scale = canvas.tokens[row, columns], float(canvas.cfg_scale[row])
        logits = model(tokens[None])[0]
        if scale:
            hidden = model(tokens.masked_fill(canvas.prompt[row, columns], MASK)[None])[0]
            logits = hidden + (scale + 1) * (logits - hidden)
        pieces.append(logits[where[columns]])
    return torch.cat(pieces)


def walk(model: Transformer, canvas: Canvas, logits_of: Callable[..., Tensor]) -> int:
    """To the end; returns the tokens that whole rows would have cost."""
    dense = 0
    while (step := plan(canvas)) is not None:
        copies = 1 + (canvas.cfg_scale[step.rows] != 0).long()
        dense += int(((canvas.stop - canvas.first)[step.rows] * copies).sum())
        commit(canvas, step, logits_of(model, canvas, step))
    return dense


def prompts_of(seed: int) -> list[list[int]]:
    """Five rows: none, one, some blocks and a rest, whole blocks, many."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, MASK, (n,), generator=generator).tolist() for n in (0, 1, 6, 8, 19)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    ("cfg_scale", "eos_id"),
    [
        (0.0, EOS),
        (1.0, None),
        pytest.param(0.0, None, marks=pytest.mark.slow),
        pytest.param(1.0, EOS, marks=pytest.mark.slow),
    ],
)
def test_finished_blocks_are_kept_exactly(
    make_model: MakeModel, rule: dict[str, Any], cfg_scale: float, eos_id: int | None
) -> None:
    """Tokens and reveal steps are those of whole rows under the network's mask, and nearly all tokens are spared."""
    ended = 0
    for seed in range(3):
        model = make_model(seed, block_length=BLOCK)
        with torch.no_grad():
            model.lm_head.weight[EOS] *= 1.4
        config = SamplingConfig(gen_length=21, steps=None, block_length=BLOCK, cfg_scale=cfg_scale, **rule)
        fast, slow = (
            prompt_canvas(
                prompts_of(seed), config, mask_id=MASK, eos_id=eos_id, seed=seed, network_block=BLOCK
            )
            for _ in range(2)
        )
        walk(model, fast, forward)
        dense = walk(model, slow, whole_rows)
        assert torch.equal(fast.tokens, slow.tokens)
        assert torch.equal(fast.reveal_step, slow.reveal_step)
        assert (fast.nfe, fast.forwards.tolist()) == (slow.nfe, slow.forwards.tolist())
        assert int(fast.token_forwards.sum()) < 0.6 * dense
        ended += int((fast.reveal_step[:, 19:] == -1).any())
    assert bool(ended) == (eos_id is not None)


def test_each_forward_is_that_of_the_whole_row(make_model: MakeModel) -> None:
    """The logits themselves, of rows that are joined half-way, and with other settings."""
    model = make_model(5, block_length=BLOCK)

    def lay_out(row: int, **knobs: Any) -> Canvas:
        config = SamplingConfig(gen_length=5 + 3 * row, block_length=BLOCK, **knobs)
        return prompt_canvas(
            [prompts_of(1)[row]], config, mask_id=MASK, suffix=[3] * row, seed=row, network_block=BLOCK
        )

    def parts() -> list[Canvas]:
        return [
            lay_out(4),
            lay_out(2, cfg_scale=1.5),
            lay_out(0, threshold=0.5),
            lay_out(3, fixed={3: 5, 4: 6, 9: 7}),
        ]

    def compared(model: Transformer, canvas: Canvas, step: Step) -> Tensor:
        expected, logits = whole_rows(model, canvas, step), forward(model, canvas, step)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        return logits

    alone = parts()
    for canvas in alone:
        walk(model, canvas, compared)
    first, *others = parts()
    for _ in range(6):
        step = plan(first)
        assert step is not None
        commit(first, step, compared(model, first, step))
    joined = Canvas.join([first, *others])
    step = plan(joined)
    assert step is not None
    commit(joined, step, compared(model, joined, step))
    joined = joined.take([2, 0, 1, 3])
    walk(model, joined, compared)
    for row, canvas in zip([1, 2, 0, 3], alone, strict=True):
        assert joined.tokens[row, joined.attended[row]].tolist() == canvas.tokens[0].tolist()
        assert int(joined.token_forwards[row]) == int(canvas.token_forwards[0])


def test_a_finished_block_costs_its_tokens_once_more_and_no_forward(make_model: MakeModel) -> None:
    """A prompt of five, eight masks: the blocks [4, 8), [8, 12), [12, 13) hold three, four and one."""
    out = generate(make_model(block_length=BLOCK), [[5, 6, 7, 8, 9]], gen_length=8, block_length=BLOCK)
    assert out.nfe == 8
    assert out.token_forwards == (8 + 4 + 4) + (8 + 4 + 4 + 4) + 5
    reveal = out.reveal_step[0]
    assert reveal[:3].max() < reveal[3:7].min()
    assert reveal[3:7].max() < reveal[7] == 7


def test_blocks_stand_where_the_networks_stand(make_model: MakeModel) -> None:
    """Counted from a row's first token, whatever its padding: the end of the prompt shares a block with the text."""
    config = SamplingConfig(gen_length=5, steps=None, block_length=BLOCK)
    canvas = prompt_canvas([[3, 3, 3, 3, 3, 3], [3]], config, mask_id=MASK, network_block=BLOCK)
    assert canvas.block_of.tolist() == [[0] * 4 + [1] * 4 + [2] * 3, [0] * 9 + [1] * 2]
    assert canvas.steps_of.tolist() == [[0, 2, 3], [3, 2, 0]]


def test_gaps_are_filled_block_by_block(make_model: MakeModel) -> None:
    """Blocks without a mask stand between those with; what is behind a gap is seen within its block alone."""
    model = make_model(2, block_length=BLOCK)
    tokens = torch.randint(2, MASK, (1, 23), generator=torch.Generator().manual_seed(3))
    tokens[0, [1, 2, 13, 15, 20]] = MASK
    out = infill(model, tokens)
    assert out.nfe == 5
    # Up to the end of the first gap's block; all from there to the second's; and from that one on.
    assert out.token_forwards == (4 + 4) + (16 + 4) + 11
    canvas = Canvas(tokens, SamplingConfig(block_length=BLOCK), mask_id=MASK, start=0, network_block=BLOCK)
    walk(model, canvas, whole_rows)
    assert torch.equal(canvas.tokens, out.sequences)
    assert torch.equal(canvas.reveal_step, out.reveal_step)
    cut = infill(model, tokens[:, :16])
    assert torch.equal(cut.sequences, out.sequences[:, :16])
    holes = generate(model, tokens, gen_length=4, block_length=BLOCK)  # holes in a prompt
    assert torch.equal(holes.sequences[:, :20], out.sequences[:, :20])


def test_a_step_that_failed_may_be_tried_again(make_model: MakeModel) -> None:
    model = make_model(1, block_length=BLOCK)
    config = SamplingConfig(gen_length=9, block_length=BLOCK)
    plain, troubled = (
        prompt_canvas([[5, 6, 7]], config, mask_id=MASK, network_block=BLOCK) for _ in range(2)
    )
    walk(model, plain, forward)

    def twice(model: Transformer, canvas: Canvas, step: Step) -> Tensor:
        forward(model, canvas, step)
        return forward(model, canvas, step)

    walk(model, troubled, twice)
    assert torch.equal(plain.tokens, troubled.tokens)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "block_length=128, but the network attends in blocks of 4: set block_length=4"),
        ({"block_length": 8}, "block_length=8, but .* set block_length=4"),
        ({"block_length": 4, "cache": "dual"}, "cache='dual' means nothing to a block-causal network"),
        ({"block_length": 4, "suffix_window": 8}, "suffix_window=8 means nothing to a block-causal"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_to_such_a_network_are_refused(
    make_model: MakeModel, knobs: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(make_model(block_length=BLOCK), [[3]], gen_length=8, **knobs)


def test_a_canvas_of_other_blocks_is_a_fault(make_model: MakeModel) -> None:
    canvas = prompt_canvas([[3]], SamplingConfig(gen_length=4, block_length=BLOCK), mask_id=MASK)
    with pytest.raises(AssertionError, match="laid out for another network"):
        next(denoise(make_model(block_length=BLOCK), canvas))


def test_rounds_take_the_networks_blocks(make_model: MakeModel) -> None:
    out = generate_rounds(make_model(block_length=BLOCK), window=10, stride=4, num_strides=2, seed=0)
    assert out.sequences.shape == (1, 18)
    assert not (out.sequences == MASK).any()


def test_what_is_settled_is_not_fed() -> None:
    cache = RowCache()
    assert settled_columns(Stretch(2, 15), 1, 4, cache) == ((2, 10), (2, 10))
    cache.settled = 4
    assert settled_columns(Stretch(2, 15), 1, 4, cache) == ((2, 10), (6, 10))
    assert settled_columns(Stretch(2, 15), 3, 4, cache) == ((2, 15), (6, 15))  # the row's end is nearer
