"""From an autoregressive network to the start of a masked-diffusion one: which rows are new, and what stands in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.adapt import diffusion_start, start_state
from llada.model.transformer import ModelConfig, Transformer

MakeModel = Callable[..., Transformer]
AR = ModelConfig(vocab_size=3000, d_model=8, num_layers=1, num_heads=2, ffn_dim=8, causal=True)


def matrix(rows: int = 3000, seed: int = 0) -> Tensor:
    """Columns of unlike means and spreads."""
    draw = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return draw * torch.arange(1, 9) + torch.arange(8) * 10


def adapt(start: ModelConfig, noise: float, seed: int = 0, **matrices: Tensor) -> dict[str, Tensor]:
    state = {f"{name}.weight": value for name, value in matrices.items()}
    rows = start_state(state, AR, start, mask_noise=noise, seed=seed)
    return {name: value[:] for name, value in rows.items()}


def test_the_start_is_bidirectional_and_has_rows_for_all_tokens() -> None:
    assert diffusion_start(AR, 7) == dataclasses.replace(AR, causal=False, mask_token_id=7)
    assert diffusion_start(AR, 7, block_length=4).block_length == 4
    assert diffusion_start(AR, 7, shift=True).shift
    assert diffusion_start(AR, 3000).vocab_size == 3008  # a multiple of 64
    assert diffusion_start(AR, 3000, vocab_size=3009).vocab_size == 3072


def test_only_the_masks_row_changes() -> None:
    embed, head = matrix(), matrix(seed=1)
    adapted = adapt(diffusion_start(AR, 5), 1.0, embed=embed, lm_head=head, norm=torch.ones(8))
    for name, before in (("embed.weight", embed), ("lm_head.weight", head)):
        assert (adapted[name] != before).any(1).nonzero().flatten().tolist() == [5]
    assert not torch.equal(adapted["embed.weight"][5], adapted["lm_head.weight"][5])
    assert torch.equal(adapted["norm.weight"], torch.ones(8))


def test_new_rows_are_mean_and_noise_of_the_other_rows_spread() -> None:
    embed = matrix()
    embed[5] = 1e6  # of no influence: this row is replaced
    others = embed[torch.arange(3000) != 5].double()
    still = adapt(diffusion_start(AR, 5), 0.0, embed=embed)["embed.weight"]
    torch.testing.assert_close(still[5].double(), others.mean(0))
    start = diffusion_start(AR, 5, vocab_size=23_000)
    grown = adapt(start, 0.5, embed=embed)["embed.weight"]
    assert grown.shape == (start.vocab_size, 8)
    drawn = (grown[3000:].double() - others.mean(0)) / others.std(0)
    assert drawn.mean(0).abs().max() < 4 * 0.5 / 20_000**0.5
    torch.testing.assert_close(drawn.std(0), torch.full((8,), 0.5, dtype=torch.float64), rtol=0.03, atol=0)


def test_a_row_follows_from_the_seed_and_its_number_whoever_reads_it() -> None:
    embed, start = matrix(), diffusion_start(AR, 2999, vocab_size=3100)
    whole = adapt(start, 1.0, embed=embed)["embed.weight"]
    rows = start_state({"embed.weight": embed}, AR, start, mask_noise=1.0, seed=0)["embed.weight"]
    assert torch.equal(torch.cat([rows[i : i + 700] for i in range(0, start.vocab_size, 700)]), whole)
    assert torch.equal(rows[3050:3060], whole[3050:3060])
    assert rows[10:10].shape == (0, 8)
    other = adapt(start, 1.0, seed=1, embed=embed)["embed.weight"]
    assert (other != whole).any(1).nonzero().flatten().tolist() == list(range(2999, start.vocab_size))


@pytest.mark.parametrize("change", [{"mask_token_id": 5}, {"causal": False}])
def test_a_mask_that_was_trained_is_kept(change: dict) -> None:
    source = dataclasses.replace(AR, **change)
    start = diffusion_start(source, 5)
    rows = start_state({"embed.weight": matrix()}, source, start, mask_noise=1.0, seed=0)
    assert torch.equal(rows["embed.weight"][:], matrix())


def test_bfloat16_stays_bfloat16() -> None:
    half = matrix().to(torch.bfloat16)
    adapted = adapt(diffusion_start(AR, 3000), 1.0, embed=half)["embed.weight"]
    assert adapted.dtype == torch.bfloat16
    assert torch.equal(adapted[:3000], half)


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf")])
def test_noise_that_is_none_is_refused(noise: float) -> None:
    with pytest.raises(UserError, match="mask_noise must be"):
        adapt(diffusion_start(AR, 5), noise, embed=matrix())
