"""The chain rule along an order: against tables whose every conditional is known, and between a network's two ways of rows."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.diffusion.chain import Order, chain_log_probs
from llada.diffusion.likelihood import log_likelihood
from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer

ORDERS: tuple[Order, ...] = ("left_to_right", "confidence")
EVERYTHING = torch.ones(27, 3, dtype=torch.bool)
SHAPE = {"vocab_size": 9, "d_model": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "max_length": 16}


def network_of(**changes: Any) -> Transformer:
    network = Transformer(ModelConfig(**SHAPE, mask_token_id=8, **changes))
    network.init_weights(5)
    return network.double()


def by_confidence(network: Callable[..., Tensor], row: Tensor) -> tuple[float, list[int]]:
    """The definition: the sum, and the order in which the tokens came."""
    canvas, total, came = torch.full((1, 3), 3), 0.0, []
    while len(came) < 3:
        log_p = network(canvas)[0].log_softmax(-1).gather(1, row[:, None])[:, 0]
        best = max((i for i in range(3) if i not in came), key=lambda i: float(log_p[i]))
        total += float(log_p[best])
        canvas[0, best] = row[best]
        came.append(best)
    return total, came


@pytest.mark.parametrize("max_rows", [1, 4, 200])
def test_left_to_right_is_the_product_of_the_conditionals(toy: Any, max_rows: int) -> None:
    network = toy.network(0.7)
    found = chain_log_probs(network, toy.sequences, EVERYTHING, mask_id=3, max_rows=max_rows)
    expected = [toy.log_p_of_order(network, row, (0, 1, 2)) for row in toy.sequences]
    assert found.sum(1).tolist() == pytest.approx(expected, rel=1e-9)
    assert found.sum(1).exp().sum().item() == pytest.approx(1, rel=1e-9)  # however wrong the network is
    first = network(torch.full((1, 3), 3))[0, 0].log_softmax(-1)
    assert found[:, 0].tolist() == pytest.approx([float(first[row[0]]) for row in toy.sequences], rel=1e-9)


@pytest.mark.parametrize("max_rows", [2, 64])
def test_confidence_reveals_what_is_surest(toy: Any, max_rows: int) -> None:
    network = toy.network(0.7)
    found = chain_log_probs(
        network, toy.sequences, EVERYTHING, order="confidence", mask_id=3, max_rows=max_rows
    )
    expected, came = zip(*(by_confidence(network, row) for row in toy.sequences), strict=True)
    assert found.sum(1).tolist() == pytest.approx(list(expected), rel=1e-9)
    assert len({tuple(order) for order in came}) > 2  # the order is the row's


@pytest.mark.parametrize("order", ORDERS)
def test_true_conditionals_give_the_joint_in_any_order(toy: Any, order: Order) -> None:
    found = chain_log_probs(toy.network(), toy.sequences, EVERYTHING, order=order, mask_id=3)
    assert found.sum(1).tolist() == pytest.approx(toy.joint.log().tolist(), rel=1e-9)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("block", [None, 2])
def test_one_token_answers_have_one_score(cfg_scale: float, block: int | None) -> None:
    network = network_of(block_length=block)
    row, scored = torch.tensor([[2, 4, 0, 1]]), torch.tensor([[False, False, False, True]])
    sampled = log_likelihood(network, row[0, :3], row[0, 3:], num_samples=1, cfg_scale=cfg_scale)
    for order in ORDERS:
        found = chain_log_probs(network, row, scored, order=order, cfg_scale=cfg_scale)
        assert found[0].tolist() == pytest.approx([0, 0, 0, sampled], rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_rows_of_different_lengths_are_scored_as_alone(order: Order, cfg_scale: float) -> None:
    network, generator = network_of(num_kv_heads=1), torch.Generator().manual_seed(0)
    lengths, prompts = [7, 3, 5], [2, 1, 0]
    tokens = torch.randint(8, (3, 7), generator=generator)
    place = torch.arange(7)
    scored = torch.stack(
        [(place >= prompt) & (place < length) for prompt, length in zip(prompts, lengths, strict=True)]
    )
    segments = torch.stack([torch.where(place < length, 0, 1) for length in lengths])
    options = {"order": order, "cfg_scale": cfg_scale}
    together = chain_log_probs(network, tokens, scored, segment_ids=segments, max_rows=4, **options)
    for row, length in enumerate(lengths):
        alone = chain_log_probs(
            network, tokens[row : row + 1, :length], scored[row : row + 1, :length], **options
        )
        assert together[row, :length].tolist() == pytest.approx(alone[0].tolist(), rel=1e-9)
    assert bool((together[~scored] == 0).all())


@pytest.mark.parametrize("order", ORDERS)
def test_the_blocks_of_a_block_causal_network_come_one_after_the_other(order: Order) -> None:
    """What stands in later blocks says nothing about earlier ones."""
    network, row = network_of(block_length=2), torch.tensor([2, 4, 0, 1, 1, 3])
    scored = (torch.arange(6) >= 1)[None]
    found = chain_log_probs(network, row[None], scored, order=order)[0]
    parts = [
        chain_log_probs(
            network, row[None, :end], scored[:, :end] & (torch.arange(end) >= begin), order=order
        )[0]
        for begin, end in ((1, 2), (2, 4), (4, 6))
    ]
    expected = [*parts[0][1:2].tolist(), *parts[1][2:4].tolist(), *parts[2][4:6].tolist()]
    assert found[1:].tolist() == pytest.approx(expected, rel=1e-9)


def test_what_cannot_be_scored_is_refused() -> None:
    network, scored = network_of(), torch.ones(1, 3, dtype=torch.bool)
    for row, message in (
        ([1, 8, 2], "holds the mask token 8"),
        ([1, 9, 2], "token id 9"),
        ([-1, 1, 2], "id -1"),
    ):
        with pytest.raises(UserError, match=message):
            chain_log_probs(network, torch.tensor([row]), scored)
    with pytest.raises(UserError, match="17 tokens exceeds"):
        chain_log_probs(network, torch.zeros(1, 17, dtype=torch.int64), torch.ones(1, 17, dtype=torch.bool))


@pytest.mark.parametrize("order", ORDERS)
def test_logits_that_are_no_numbers_are_no_score(order: Order) -> None:
    def damaged(tokens: Tensor, **_: Tensor) -> Tensor:
        return torch.full((*tokens.shape, 4), math.nan)

    with pytest.raises(FloatingPointError, match="no numbers"):
        chain_log_probs(
            damaged, torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool), order=order, mask_id=3
        )
