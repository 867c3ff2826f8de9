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
from llada.sampling.sampler import commit, plan

MakeModel = Callable[..., Transformer]
MASK = 22
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


def test_batch_invariant_rows_get_the_logits_of_the_row_alone_bit_for_bit(
    make_model: MakeModel, watch_products: WatchProducts
) -> None:
    """Guided ones, whose second copy stands elsewhere in the forward, too."""
    model, canvas = make_model(2).to(torch.bfloat16), mixed_canvas()
    rows = watch_products(model)
    singles = [canvas.take([row]) for row in range(4)]
    while (step := plan(canvas)) is not None:
        logits = forward(model, canvas, step, batch_invariant=True)
        per_row = dict(zip(step.rows.tolist(), logits.split(step.where.sum(1).tolist()), strict=True))
        for row, expected in per_row.items():
            own = plan(singles[row])
            assert own is not None
            found = forward(model, singles[row], own, batch_invariant=True)
            assert torch.equal(found, expected)
            commit(singles[row], own, found)
        commit(canvas, step, logits)
    assert rows == {64}


def test_the_products_of_a_plain_function_are_not_ours_to_shape() -> None:
    canvas = mixed_canvas()
    step = plan(canvas)
    assert step is not None
    with pytest.raises(UserError, match="batch_invariant needs a network of ours"):
        forward(lambda tokens: torch.zeros(*tokens.shape, 23), canvas, step, batch_invariant=True)
