"""The forward of a step: rows of any company get the logits of the dense network, guided where they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.predict import guided_predict
from llada.model.transformer import Transformer
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.forward import forward
from llada.sampling.generate import generate
from llada.sampling.sampler import commit, plan

MakeModel = Callable[..., Transformer]
RandomPrompt = Callable[..., Tensor]
MASK = 22
WalkBitForBit = Callable[[Transformer, Canvas], None]
WatchProducts = Callable[[Transformer], set[int]]


def mixed_canvas() -> Canvas:
    """Left-padded and short rows, blocks of other lengths, some guided."""
    rows = [([3, 4, 5], 0.0, 6), ([], 1.0, 3), ([6], 0.0, 9), ([7, 8, 9, 2], 2.5, 4)]
    canvases = [
        prompt_canvas(
            torch.tensor([[0, 0, *prompt]]),
            SamplingConfig(gen_length=9, block_length=block, cfg_scale=scale),
            mask_id=MASK,
            seed=0,
            attention_mask=torch.tensor([[0, 0, *[1] * len(prompt)]]),
        )
        for prompt, scale, block in rows
    ]
    return Canvas.join(canvases)


@torch.no_grad()
def dense(model: Transformer, canvas: Canvas, where: Tensor) -> Tensor:
    """All rows padded to the longest, all of them doubled."""
    scale = canvas.cfg_scale.repeat_interleave(where.sum(1))[:, None].float()
    mask = canvas.attended.long()
    return guided_predict(
        model, canvas.tokens, where, canvas.prompt, scale, canvas.mask_id, attention_mask=mask
    )


def test_every_row_gets_the_logits_of_the_dense_network(make_model: MakeModel) -> None:
    model, canvas = make_model(2), mixed_canvas()
    forwards = 0
    while (step := plan(canvas)) is not None:
        where = torch.zeros_like(canvas.attended)
        where[step.rows] = step.where
        logits = forward(model, canvas, step)
        torch.testing.assert_close(logits, dense(model, canvas, where), rtol=1e-3, atol=1e-3)
        commit(canvas, step, logits)
        forwards += 1
    assert forwards == 9
    # A guided row feeds itself twice, no row feeds any padding.
    assert canvas.token_forwards.tolist() == [9 * 12, 9 * 2 * 9, 9 * 10, 9 * 2 * 13]


def test_a_plain_function_gets_whole_rows_and_gives_the_same(make_model: MakeModel) -> None:
    model, ours, plain = make_model(2), mixed_canvas(), mixed_canvas()
    shapes = []

    def function(tokens: Tensor) -> Tensor:
        shapes.append(tuple(tokens.shape))
        return model(tokens)

    while (step := plan(ours)) is not None:
        same = plan(plain)
        assert same is not None
        one, two = forward(model, ours, step), forward(function, plain, same)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
        commit(ours, step, one)
        commit(plain, same, two)
    assert torch.equal(ours.tokens, plain.tokens)
    assert torch.equal(ours.token_forwards, plain.token_forwards)
    assert {shape[1] for shape in shapes} == {12, 9, 10, 13}


@pytest.mark.parametrize("with_mask", [False, True])
def test_guidance_is_the_formula(make_model: MakeModel, random_prompt: RandomPrompt, with_mask: bool) -> None:
    model, prompt = make_model(3), random_prompt(2, 4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]) if with_mask else None
    canvas = torch.cat([prompt, torch.full((2, 1), MASK)], dim=1)
    hidden = torch.full_like(canvas, MASK)
    full = None if mask is None else torch.cat([mask, torch.ones(2, 1).long()], dim=1)
    with torch.no_grad():
        cond, un = model(canvas, full)[:, -1].double(), model(hidden, full)[:, -1].double()
    logits = un + (1.5 + 1) * (cond - un)
    logits[:, MASK] = -torch.inf
    out = generate(model, prompt, gen_length=1, steps=1, block_length=1, cfg_scale=1.5, attention_mask=mask)
    assert out.sequences[:, -1].tolist() == logits.argmax(-1).tolist()
    assert out.token_forwards == 2 * (9 if with_mask else 10)  # padding is not fed
    assert out.nfe == 1
    plain = generate(model, prompt, gen_length=1, steps=1, block_length=1, attention_mask=mask)
    assert plain.token_forwards == (9 if with_mask else 10)
    guided = [
        generate(
            model, prompt, gen_length=10, steps=10, block_length=10, cfg_scale=w, attention_mask=mask
        ).sequences
        for w in (0.0, 1.5)
    ]
    assert not torch.equal(*guided)


@torch.no_grad()
def growing_by_blocks(
    model: Transformer, prompt: list[int], most: int, size: int, threshold: float | None, eos_id: int
) -> tuple[list[int], int, int]:
    """iLLaDA's canvas, from its definition: a block of masks is put behind the text and denoised, then the next, until EOS or
    `most` tokens. The text up to EOS, forwards, and tokens fed."""
    text: list[int] = []
    forwards = fed = 0
    while len(text) < most and eos_id not in text:
        begin = len(text)
        text += [MASK] * min(size, most - begin)
        while MASK in text:
            logits = model(torch.tensor([prompt + text]))[0, len(prompt) :].double()
            forwards, fed = forwards + 1, fed + len(prompt) + len(text)
            logits[:, MASK] = -torch.inf
            probs, best = logits.softmax(1).max(1)
            probs = torch.where(torch.tensor(text) == MASK, probs, -1.0)
            surest = next(i for i in range(len(text)) if probs[i] > probs.max() - 1e-6)
            chosen = [i for i in range(begin, len(text)) if threshold is not None and probs[i] >= threshold]
            for i in chosen or [surest]:
                text[i] = int(best[i])
                if text[i] == eos_id:
                    text = text[: i + 1]
                    break
    return text, forwards, fed


def test_without_a_suffix_the_canvas_grows_by_blocks_until_the_end(make_model: MakeModel) -> None:
    lengths = set()
    for seed, scale in ((1, 1.0), (2, 1.5), (3, 2.5)):
        model = make_model(seed)
        with torch.no_grad():
            model.lm_head.weight[1].mul_(scale)
        for prompt in ([], [3, 4, 5], [7, 8, 9, 10, 11, 12]):
            for most, size, threshold in (
                (17, 4, None),
                (17, 5, 0.3),
                (8, 8, None),
                (9, 20, 0.5),
                (12, 1, None),
            ):
                text, forwards, fed = growing_by_blocks(model, prompt, most, size, threshold, 1)
                out = generate(
                    model,
                    [prompt],
                    gen_length=most,
                    block_length=size,
                    threshold=threshold,
                    suffix_window=0,
                    eos_id=1,
                )
                written = out.sequences[0, len(prompt) :].tolist()
                assert written == text + [1] * (most - len(text))
                assert (out.nfe, out.token_forwards) == (forwards, fed)
                lengths.add(len(text))
    assert {17, 8, 12} <= lengths
    assert len(lengths) > 6


def test_batch_invariant_rows_get_the_logits_of_the_row_alone_bit_for_bit(
    make_model: MakeModel, watch_products: WatchProducts, walk_bit_for_bit: WalkBitForBit
) -> None:
    """Guided ones, whose second copy stands elsewhere in the forward, too."""
    model, canvas = make_model(2).to(torch.bfloat16), mixed_canvas()
    rows = watch_products(model)
    walk_bit_for_bit(model, canvas)
    assert rows == {64}


def test_the_products_of_a_plain_function_are_not_ours_to_shape() -> None:
    canvas = mixed_canvas()
    step = plan(canvas)
    assert step is not None
    with pytest.raises(UserError, match="batch_invariant needs a network of ours"):
        forward(lambda tokens: torch.zeros(*tokens.shape, 23), canvas, step, batch_invariant=True)
