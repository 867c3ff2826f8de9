"""Random lengths and splits: how often, where, and that nothing but the row and the step decides."""

from dataclasses import replace

import pytest
import torch

from llada.diffusion.batch import Batch
from llada.diffusion.objective import ObjectiveConfig
from llada.model.transformer import ModelConfig, Transformer
from llada.training.lengths import split_rows, vary_lengths

L = 12


def rows(number: int, *, first: int = 0, documents: bool = False, epoch: int = 0) -> Batch:
    """Rows first … of a data set; with documents of six tokens each, the last row's second half padding."""
    ids = torch.arange(first, first + number)
    segments = (torch.arange(L) // 6).int().expand(number, L).clone()
    segments[-1, 6:] = -1
    return Batch(
        tokens=(ids[:, None] + torch.arange(L)) % 8 + 2,
        segment_ids=segments if documents else None,
        maskable=torch.ones(number, L, dtype=torch.bool),
        slots=ids,
        epochs=torch.full_like(ids, epoch),
        sample_ids=ids,
        step=0,
        global_rows=number,
        per_row=False,
    )


def places(segments: torch.Tensor) -> list[int]:
    """Where each row is split: the first column of its second part, L for none. Documents must not be among them."""
    return [int((row != row[0]).nonzero()[0]) if (row != row[0]).any() else L for row in segments]


def test_the_published_share_of_rows_is_split_at_any_place() -> None:
    found = torch.tensor(places(split_rows(rows(20_000), 0.3, 0)))
    counts = torch.bincount(found, minlength=L + 1) / 20_000
    assert counts[L] == pytest.approx(0.7, abs=4 * (0.21 / 20_000) ** 0.5)
    assert counts[0] == 0
    # 6,000 over eleven places.
    assert (counts[1:L] - 0.3 / 11).abs().max() < 4 * (0.027 / 20_000) ** 0.5


def test_a_split_belongs_to_the_row_and_its_epoch() -> None:
    whole = split_rows(rows(64), 0.5, 0)
    assert torch.equal(split_rows(rows(10, first=20), 0.5, 0), whole[20:30])
    assert not torch.equal(split_rows(rows(64, epoch=1), 0.5, 0), whole)
    assert not torch.equal(split_rows(rows(64), 0.5, 1), whole)
    mixed = replace(rows(64), epochs=torch.arange(64) % 2)
    both = torch.stack([whole, split_rows(rows(64, epoch=1), 0.5, 0)])
    assert torch.equal(split_rows(mixed, 0.5, 0), both[torch.arange(64) % 2, torch.arange(64)])


def test_documents_stay_apart_and_are_split_too() -> None:
    batch = rows(200, documents=True)
    assert batch.segment_ids is not None
    split, plain = split_rows(batch, 1.0, 0), split_rows(rows(200), 1.0, 0)
    same = split[:, :, None] == split[:, None, :]
    wanted = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    wanted &= (plain[:, :, None] == plain[:, None, :]) | (batch.segment_ids < 0)[:, :, None]
    assert torch.equal(same, wanted)
    assert (split[-1, 6:] == -1).all()


def test_the_parts_of_a_row_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            vocab_size=12, d_model=16, num_layers=2, num_heads=2, ffn_dim=24, max_length=L, mask_token_id=1
        )
    )
    model.init_weights(0)
    batch = vary_lengths(rows(8), ObjectiveConfig(random_split=1.0), 0)
    assert batch.segment_ids is not None
    other = batch.tokens.clone()
    ends = places(batch.segment_ids)
    for row, end in enumerate(ends):
        other[row, end:] = 2
    before, after = (model(tokens, segment_ids=batch.segment_ids) for tokens in (batch.tokens, other))
    for row, end in enumerate(ends):
        assert torch.equal(before[row, :end], after[row, :end])
        alone = model(batch.tokens[row : row + 1, end:])  # rotary positions are relative
        torch.testing.assert_close(before[row, end:], alone[0], rtol=1e-4, atol=1e-5)


def test_a_cut_row_is_split_within_its_length() -> None:
    config = ObjectiveConfig(random_length=1.0, random_split=1.0)
    lengths = set()
    for step in range(40):
        batch = vary_lengths(replace(rows(6, documents=True), step=step), config, 0)
        assert batch.segment_ids is not None
        length = batch.tokens.shape[1]
        assert batch.segment_ids.shape == batch.maskable.shape == (6, length)
        assert length == 1 or all(1 <= place < length for place in places(batch.segment_ids[:5]))
        lengths.add(length)
    assert len(lengths) > 8


def test_without_either_nothing_changes() -> None:
    batch = rows(3)
    assert vary_lengths(batch, ObjectiveConfig(), 0) is batch
