"""Who attends to whom: positions, blocks, and a block-causal network against one forward for each of its blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from llada.model.attention import (
    AttentionMask,
    block_numbers,
    masked_attention,
    row_positions,
    stretch_bias,
    takes_tiles,
)
from llada.model.transformer import Transformer

MakeModel = Callable[..., Transformer]
CPU = torch.device("cpu")

# Three rows: padded at the left, not, wholly padding; documents of which the second row's are one column long here and there.
ATTENDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0] * 9])
DOCUMENTS = torch.tensor([[-1, -1, -1, 0, 0, 0, 0, 1, 1], [0, 0, 1, 2, 2, 2, 2, 2, -1], [-1] * 9])


def all_kinds() -> Iterator[tuple[Tensor | None, Tensor | None, dict[str, Any]]]:
    """All combinations of inputs and networks that have a mask."""
    sights: list[dict] = [
        {},
        {"causal": True},
        {"lookahead": 0},
        {"lookahead": 2},
        {"block_length": 2},
        {"block_length": 2, "with_context": True},
    ]
    for attended, documents, sight in itertools.product([None, ATTENDED], [None, DOCUMENTS], sights):
        if attended is not None or documents is not None or not sight.keys() <= {"causal"}:
            yield attended, documents, sight


def mask_of(attended: Tensor | None, documents: Tensor | None, **sight: Any) -> AttentionMask:
    mask = AttentionMask.of(attended, documents, 9, CPU, **sight)
    assert mask is not None
    return mask


def in_words(
    attended: Tensor | None,
    documents: Tensor | None,
    *,
    causal: bool = False,
    lookahead: int | None = None,
    block_length: int | None = None,
    with_context: bool = False,
) -> Tensor:
    """(3, 1, L, L), one pair at a time: who attends to whom, from the sentences that say so."""
    columns = [(copy, i) for copy in ("noised", "clean")[: 1 + with_context] for i in range(9)]
    allowed = torch.zeros(3, 1, len(columns), len(columns), dtype=torch.bool)
    blocks = block_numbers(attended, documents, block_length or 9, 9, CPU).expand(3, 9).tolist()
    for b, (m, (to_copy, q)), (n, (of_copy, k)) in itertools.product(
        range(3), enumerate(columns), enumerate(columns)
    ):
        is_padding = attended is not None and not attended[b, k] and attended[b].any()
        sees = not is_padding and (documents is None or bool(documents[b, q] == documents[b, k]))
        sees = sees and not (causal and k > q) and not (lookahead is not None and k > q + lookahead)
        block_of_q, block_of_k = blocks[b][q], blocks[b][k]
        if block_length is not None:
            sees = sees and block_of_k <= block_of_q
        if with_context and to_copy == "noised":
            sees = sees and (of_copy == "noised") == (block_of_k == block_of_q)
        elif with_context:
            sees = sees and of_copy == "clean"
        is_plain = documents is None and block_length is None and lookahead is None and not causal
        allowed[b, 0, m, n] = sees or (attended is not None and not is_plain and m == n)
    return allowed


def test_the_dense_mask_is_what_the_sentences_say() -> None:
    for attended, documents, sight in all_kinds():
        dense = mask_of(attended, documents, **sight).dense()
        expected = in_words(attended, documents, **sight)
        assert torch.equal(dense.expand_as(expected), expected), (attended, documents, sight)
        assert expected.any(-1).all()  # nobody sees nothing, which would be NaN


def test_where_everybody_sees_all_there_is_no_mask() -> None:
    assert AttentionMask.of(None, None, 9, CPU) is None
    assert AttentionMask.of(None, None, 9, CPU, causal=True) is None
    assert AttentionMask.of(torch.ones(2, 9), None, 9, CPU) is None
    assert AttentionMask.of(None, None, 9, CPU, block_length=9) is None
    assert mask_of(ATTENDED, None).dense().shape == (3, 1, 1, 9)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_tiles_are_the_dense_mask() -> None:
    """FlexAttention makes its tiles of the same definition, and attends under them as torch does under the dense mask."""
    generator = torch.Generator().manual_seed(0)
    for attended, documents, sight in all_kinds():
        mask = mask_of(attended, documents, **sight)
        whole = create_mask(mask.sees, mask.rows, None, mask.length, mask.length, device="cpu")
        assert torch.equal(mask.dense().expand_as(whole), whole), (attended, documents, sight)
    in_context: dict[str, Any] = {"block_length": 2, "with_context": True}
    for attended, documents, sight in [(None, DOCUMENTS, {}), (ATTENDED, DOCUMENTS, in_context)]:
        mask = mask_of(attended, documents, **sight)
        q, k, v = (torch.randn(3, mask.length, heads, 16, generator=generator) for heads in (4, 2, 2))
        dense = masked_attention(q, k, v, mask.dense(), causal=False)
        torch.testing.assert_close(masked_attention(q, k, v, mask.tiles(), causal=False), dense)
        assert dense.isfinite().all()


def test_unseen_tiles_are_left_out() -> None:
    """Documents of 512 columns in rows of 2048: each tile of 128 x 128 that is touched lies within a document."""
    documents = (torch.arange(2048) // 512)[None]
    mask = AttentionMask.of(None, documents, 2048, CPU)
    assert mask is not None
    assert mask.tiles().sparsity() == pytest.approx(75.0)


def test_a_layer_with_tiles_is_one_graph_for_all_batches(make_model: MakeModel) -> None:
    """As a trainer compiles it. Neither other documents nor, from the second on, another length compile it anew."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    model = make_model(d_model=64, max_length=512).requires_grad_(False)
    layer = torch.compile(model.layers[0], backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for length, compiled in [(256, 1), (256, 1), (400, 2), (300, 2)]:
        documents = torch.randint(0, 3, (2, length), generator=generator).sort(1).values
        mask = AttentionMask.of(None, documents, length, CPU)
        assert mask is not None
        x, turn = torch.randn(2, length, 64, generator=generator), model._rotary(torch.arange(length))
        expected = model.layers[0](x, *turn, mask.dense())
        torch.testing.assert_close(layer(x, *turn, mask.tiles()), expected, atol=1e-5, rtol=1e-5)
        assert counter.frame_count == compiled, length


def test_tiles_are_for_cuda_and_a_compiler() -> None:
    assert takes_tiles("cuda", 64, can_compile=True)
    assert not takes_tiles("cuda", 64, can_compile=False)
    assert not takes_tiles("cuda", 8, can_compile=True)  # narrower than what its kernels multiply
    assert not takes_tiles("cpu", 64, can_compile=True)


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
    sight = AttentionMask.of(None, None, 8, CPU, block_length=3)
    assert sight is not None
    whole = sight.dense()
    for begin, end in [(0, 8), (3, 8), (2, 7), (5, 6), (6, 8), (0, 3), (4, 6)]:
        mask = stretch_bias(begin, end, 3)
        expected = whole[0, 0, begin:end, :end]
        assert (mask is None) == (begin // 3 == (end - 1) // 3)
        assert torch.equal(torch.ones_like(expected) if mask is None else mask, expected)
