"""Rows laid end to end: each gets what the dense forward gives it, whoever stands beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llada.model.transformer import Block, Transformer
from llada.sampling.cache import KeyValues
from llada.sampling.packed import (
    MANY,
    PART,
    Fed,
    attend_alike,
    attend_row,
    in_chunks,
    in_parts,
    packed_forward,
)

MakeModel = Callable[..., Transformer]
LENGTHS = (3, 7, 7, 1, 12, 3, 9)
WatchProducts = Callable[[Transformer], set[int]]


def random_rows(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 23, (length,), generator=generator) for length in LENGTHS]


def run(
    model: Transformer, rows: list[tuple[Fed, torch.Tensor]], *, batch_invariant: bool = False
) -> list[torch.Tensor]:
    """Logits of all tokens of each row, in the order given."""
    order = sorted(range(len(rows)), key=lambda r: rows[r][0].shape)
    fed = [rows[r][0] for r in order]
    tokens = torch.cat([rows[r][1] for r in order])
    positions = torch.cat([torch.arange(one.begin, one.begin + one.count) for one in fed])
    at = torch.arange(len(tokens))
    logits = packed_forward(model, fed, tokens, positions, at, batch_invariant=batch_invariant)
    parts = dict(zip(order, logits.split([one.count for one in fed]), strict=True))
    return [parts[r] for r in range(len(rows))]


# A plain network, and one with all that Qwen2 and Qwen3 have besides.
KINDS: list[dict] = [{}, {"head_width": 10, "qkv_bias": True, "qk_norm": True}]


def make_kind(make_model: MakeModel, **kind: object) -> Transformer:
    model = make_model(**kind)
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, {"causal": True}], ids=str)
@pytest.mark.parametrize("left", [False, True])
def test_whole_rows_equal_the_dense_forward(make_model: MakeModel, kind: dict, left: bool) -> None:
    model, rows = make_kind(make_model, **kind), random_rows()
    width = max(LENGTHS)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(rows):
        part = slice(width - len(ids), width) if left else slice(0, len(ids))
        tokens[row, part], mask[row, part] = ids, 1
    dense = model(tokens, mask)
    packed = run(model, [(Fed(len(ids), 0, len(ids), None), ids) for ids in rows])
    for row, own in enumerate(packed):
        torch.testing.assert_close(own, dense[row][mask[row].bool()], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_part_that_sees_what_is_kept_of_an_unchanged_row_equals_the_whole(
    make_model: MakeModel, kind: dict
) -> None:
    model, rows = make_kind(make_model, **kind), random_rows()
    stores = [KeyValues(len(ids)) for ids in rows]
    whole = run(model, [(Fed(len(i), 0, len(i), s), i) for i, s in zip(rows, stores, strict=True)])
    plain = run(model, [(Fed(len(i), 0, len(i), None), i) for i in rows])
    parts = [slice(len(ids) // 3, len(ids) - len(ids) // 4) for ids in rows]
    again = run(
        model,
        [
            (Fed(part.stop - part.start, part.start, len(ids), store), ids[part])
            for ids, store, part in zip(rows, stores, parts, strict=True)
        ],
    )
    for one, two, part, own in zip(whole, plain, parts, again, strict=True):
        assert torch.equal(one, two)  # keeping something changes nothing
        torch.testing.assert_close(own, one[part], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_row_does_not_see_its_neighbours(make_model: MakeModel) -> None:
    model, rows = make_model(), random_rows()
    others = [ids if row == 2 else (ids + 5) % 22 for row, ids in enumerate(rows)]
    one, two = (run(model, [(Fed(len(i), 0, len(i), None), i) for i in batch]) for batch in (rows, others))
    assert torch.equal(one[2], two[2])
    assert not torch.allclose(one[1], two[1])


@torch.no_grad()
def test_only_the_first_columns_are_seen(make_model: MakeModel) -> None:
    model, ids = make_model(), random_rows()[4]
    store = KeyValues(len(ids))
    run(model, [(Fed(len(ids), 0, len(ids), store), ids)])
    (own,) = run(model, [(Fed(7, 0, 7, store), ids[:7])])
    (short,) = run(model, [(Fed(7, 0, 7, None), ids[:7])])
    assert torch.equal(own, short)


@torch.no_grad()
def test_rows_of_equal_shapes_attend_together_as_one_by_one(make_model: MakeModel) -> None:
    model, generator = make_model(), torch.Generator().manual_seed(0)
    block = model.layers[0]
    assert isinstance(block, Block)
    rows = []
    for _ in range(3):
        store = KeyValues(9)
        store.put(0, slice(0, 9), *torch.randn(2, 9, 2, 6, generator=generator))
        rows.append(Fed(4, 2, 8, store))
    queries = torch.randn(3, 4, 4, 6, generator=generator)
    together = attend_alike(0, block, rows, queries)
    for row, own, expected in zip(rows, queries, together, strict=True):
        torch.testing.assert_close(attend_row(0, block, row, own), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_chunks_change_the_shape_of_the_products_and_nothing_else(
    make_model: MakeModel, watch_products: WatchProducts, count: int
) -> None:
    model = make_model()
    block = model.layers[0]
    assert isinstance(block, Block)
    generator = torch.Generator().manual_seed(0)
    x, heads = (torch.randn(count, *shape, generator=generator) for shape in ((24,), (4, 6)))
    turn = torch.randn(2, count, 1, 6, generator=generator)
    expected = (*block.project(x, *turn), block.mix(x, heads))
    rows = watch_products(model)
    found = (*in_chunks(block.project, x, *turn), in_chunks(block.mix, x, heads))
    assert rows == {64 if count else 0}
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("count", "shapes"),
    [(0, {0}), (1, {1}), (MANY, {MANY}), (MANY + 1, {PART, 1}), (MANY + PART + 44, {PART, 44})],
)
def test_very_many_tokens_go_in_parts(
    make_model: MakeModel, watch_products: WatchProducts, count: int, shapes: set[int]
) -> None:
    model = make_model()
    block = model.layers[0]
    assert isinstance(block, Block)
    x = torch.randn(count, 24, generator=torch.Generator().manual_seed(0))
    turn = torch.ones(2, count, 1, 6)
    expected = block.project(x, *turn)
    rows = watch_products(model)
    found = in_parts(block.project, x, *turn)
    assert rows == shapes
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_length", [None, 4])
def test_batch_invariant_rows_equal_those_alone_bit_for_bit(
    make_model: MakeModel, watch_products: WatchProducts, dtype: torch.dtype, block_length: int | None
) -> None:
    """Rows of one token among them: a vector times a matrix is another kernel than a matrix, and sums in another order."""
    model, rows = make_model(block_length=block_length).to(dtype), random_rows()
    rows += [row.repeat(3) for row in rows]  # more than a chunk holds
    products = watch_products(model)
    whole = [KeyValues(len(ids)) for ids in rows]
    part = [slice(len(ids) // 2, len(ids)) for ids in rows]
    first = [(Fed(len(ids), 0, len(ids), store), ids) for ids, store in zip(rows, whole, strict=True)]
    then = [
        (Fed(own.stop - own.start, own.start, len(ids), store), ids[own])
        for ids, own, store in zip(rows, part, whole, strict=True)
    ]
    for fed in (first, then):
        together = run(model, fed, batch_invariant=True)
        for row, expected in zip(fed, together, strict=True):
            assert torch.equal(run(model, [row], batch_invariant=True)[0], expected)
    assert products == {64}


@torch.no_grad()
def test_batch_invariant_rows_attend_singly(make_model: MakeModel) -> None:
    """Also where their shapes are the same: how a kernel goes about many rows is its business."""
    model, rows = make_model(), [ids for ids in random_rows() if len(ids) == 7]
    seen = []

    class Watched(Block):
        def attention(self, q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            seen.append(len(q))
            return super().attention(q, *others)

    for layer in model.layers:
        layer.__class__ = Watched
    fed = [(Fed(7, 0, 7, None), ids) for ids in rows]
    run(model, fed)
    assert seen == [2, 2]
    run(model, fed, batch_invariant=True)
    assert seen == [2, 2, 1, 1, 1, 1]
