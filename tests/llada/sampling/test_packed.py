"""Rows laid end to end: each gets what the dense forward gives it, whoever stands beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llada.model.transformer import Block, Transformer
from llada.sampling.cache import KeyValues
from llada.sampling.packed import Fed, attend_alike, attend_row, packed_forward

MakeModel = Callable[..., Transformer]
LENGTHS = (3, 7, 7, 1, 12, 3, 9)


def random_rows(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 23, (length,), generator=generator) for length in LENGTHS]


def run(model: Transformer, rows: list[tuple[Fed, torch.Tensor]]) -> list[torch.Tensor]:
    """Logits of all tokens of each row, in the order given."""
    order = sorted(range(len(rows)), key=lambda r: rows[r][0].shape)
    fed = [rows[r][0] for r in order]
    tokens = torch.cat([rows[r][1] for r in order])
    positions = torch.cat([torch.arange(one.begin, one.begin + one.count) for one in fed])
    logits = packed_forward(model, fed, tokens, positions, torch.arange(len(tokens)))
    parts = dict(zip(order, logits.split([one.count for one in fed]), strict=True))
    return [parts[r] for r in range(len(rows))]


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_whole_rows_equal_the_dense_forward(make_model: MakeModel, causal: bool, left: bool) -> None:
    model, rows = make_model(causal=causal), random_rows()
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
def test_a_part_that_sees_what_is_kept_of_an_unchanged_row_equals_the_whole(make_model: MakeModel) -> None:
    model, rows = make_model(), random_rows()
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
