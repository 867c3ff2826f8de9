"""Who attends to whom: positions, blocks, and a block-causal network against one forward for each of its blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llada.model.attention import attention_bias, block_numbers, row_positions, stretch_bias
from llada.model.transformer import Transformer

MakeModel = Callable[..., Transformer]
CPU = torch.device("cpu")


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 22, shape, generator=torch.Generator().manual_seed(seed))


def test_positions_count_from_the_first_attended_column() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert row_positions(mask).tolist() == [[-2, -1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_blocks_count_from_the_first_token_of_a_row_and_of_a_document() -> None:
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    documents = torch.tensor([[5, 5, 5, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0]])
    assert block_numbers(None, None, 3, 7, CPU).tolist() == [[0, 0, 0, 1, 1, 1, 2]]
    assert block_numbers(padded, None, 2, 7, CPU).tolist() == [[0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2, 3]]
    assert block_numbers(None, documents, 2, 7, CPU).tolist() == [
        [0, 0, 1, 0, 0, 1, 1],
        [0, 0, 1, 1, 2, 2, 3],
    ]
    # A document that begins before the first attended column begins there.
    assert block_numbers(padded[:1], documents[1:], 2, 7, CPU).tolist() == [[0, 0, 0, 0, 1, 1, 2]]


def test_a_position_sees_its_block_and_the_earlier_ones(make_model: MakeModel) -> None:
    tokens, model = random_tokens(1, 8), make_model(block_length=3)
    base = model(tokens)
    for i in range(8):
        changed = tokens.clone()
        changed[0, i] = (changed[0, i] + 1) % 22
        moved = (model(changed) - base)[0].abs().amax(-1) > 1e-5
        assert torch.equal(moved, torch.arange(8) >= i // 3 * 3), i


def test_one_block_is_the_bidirectional_network(make_model: MakeModel) -> None:
    tokens = random_tokens(2, 8)
    assert attention_bias(None, None, 8, CPU, block_length=8) is None
    assert torch.equal(make_model(block_length=8)(tokens), make_model()(tokens))
    assert not torch.allclose(make_model(block_length=7)(tokens), make_model()(tokens))


def one_block_at_a_time(model: Transformer, tokens: Tensor, context: Tensor) -> Tensor:
    """(L, V): of each block, what the network says of it alone behind the clean blocks before it."""
    length = model.config.block_length
    assert length is not None
    pieces = []
    for begin in range(0, len(tokens), length):
        row = torch.cat([context[:begin], tokens[begin : begin + length]])
        pieces.append(model(row[None])[0, begin:])
    return torch.cat(pieces)


def test_context_is_one_forward_for_each_block(make_model: MakeModel) -> None:
    model = make_model(1, block_length=3)
    context = random_tokens(2, 11)
    tokens = context.masked_fill(torch.rand(2, 11, generator=torch.Generator().manual_seed(2)) < 0.5, 22)
    logits = model(tokens, context=context)
    assert logits.shape == (2, 11, 23)
    for row in range(2):
        oracle = one_block_at_a_time(model, tokens[row], context[row])
        torch.testing.assert_close(logits[row], oracle, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits[:, 3:], model(tokens)[:, 3:], atol=1e-3)  # which sees noised blocks
    where = tokens == 22
    torch.testing.assert_close(model(tokens, context=context, logits_at=where), logits[where])


def test_context_within_documents_and_behind_padding(make_model: MakeModel) -> None:
    model = make_model(1, block_length=2)
    context = random_tokens(2, 9)
    tokens = context.masked_fill(torch.rand(2, 9, generator=torch.Generator().manual_seed(2)) < 0.5, 22)
    documents = torch.tensor([[0] * 3 + [1] * 5 + [-1], [4] * 9])
    packed = model(tokens, segment_ids=documents, context=context)
    padded = model(tokens, (torch.arange(9) >= 4).expand(2, -1), context=context)
    for out, row, begin, end in [(packed, 0, 0, 3), (packed, 0, 3, 8), (packed, 1, 0, 9), (padded, 1, 4, 9)]:
        oracle = one_block_at_a_time(model, tokens[row, begin:end], context[row, begin:end])
        torch.testing.assert_close(out[row, begin:end], oracle, atol=2e-5, rtol=1e-4)
    assert packed.isfinite().all()


def test_context_needs_a_network_of_blocks(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="context is for a block-causal network"):
        make_model()(random_tokens(1, 4), context=random_tokens(1, 4))


def test_the_mask_of_a_stretch_is_a_part_of_the_rows() -> None:
    whole = attention_bias(None, None, 8, CPU, block_length=3)
    assert whole is not None
    for begin, end in [(0, 8), (3, 8), (2, 7), (5, 6), (6, 8), (0, 3), (4, 6)]:
        mask = stretch_bias(begin, end, 3)
        expected = whole[0, 0, begin:end, :end]
        assert (mask is None) == (begin // 3 == (end - 1) // 3)
        assert torch.equal(torch.ones_like(expected) if mask is None else mask, expected)
