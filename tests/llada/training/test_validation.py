"""The validation bound: distinct rows, the same noise at every call, however the rows are batched."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llada.data.tokens.shards import TokenDataset
from llada.diffusion.cross_entropy import SLICE
from llada.diffusion.objective import ObjectiveConfig
from llada.errors import UserError
from llada.model.transformer import Transformer
from llada.training.validation import Validation

CPU = torch.device("cpu")


def validation(
    folder: Any, *, rows: int = 11, micro_rows: int = 4, seed: int = 0, **knobs: Any
) -> Validation:
    return Validation(
        TokenDataset(folder.url, "validation"),
        ObjectiveConfig(**knobs),
        num_rows=rows,
        seed=seed,
        micro_rows=micro_rows,
    )


@pytest.fixture
def network(make_config: Callable) -> Transformer:
    model = Transformer(make_config()[0])
    model.init_weights(0)
    return model


def test_rows_are_distinct_and_levels_cover_everything(pretrain_folder: Any) -> None:
    fixed = validation(pretrain_folder)
    assert sorted(fixed.batch.sample_ids.tolist()) == list(range(11))
    tokens = fixed.batch.maskable.sum(1)
    strata = (fixed.counts - 1) / tokens
    assert ((strata - torch.arange(11) / 11).abs() < 1 / 11 + 1 / tokens).all()
    assert (fixed.counts >= 1).all()
    assert (fixed.counts <= tokens).all()
    some = validation(pretrain_folder, rows=5)
    assert len(set(some.batch.sample_ids.tolist())) == 5
    assert len(validation(pretrain_folder, rows=400).batch.tokens) == 11  # no row twice


@pytest.mark.parametrize("knobs", [{}, {"document_mask": False}, {"kind": "autoregressive"}], ids=str)
def test_repeated_calls_and_other_batches_give_the_same_number(
    pretrain_folder: Any, make_config: Callable, knobs: dict
) -> None:
    model = Transformer(make_config(causal="kind" in knobs)[0])
    model.init_weights(0)
    fixed = validation(pretrain_folder, **knobs)
    first = fixed(model, CPU, torch.float32)
    assert fixed(model, CPU, torch.float32) == first
    assert model.training
    for micro_rows in (1, 3, 64):
        other = validation(pretrain_folder, micro_rows=micro_rows, **knobs)
        assert other(model, CPU, torch.float32) == pytest.approx(first, rel=1e-6)
    if not knobs:
        assert validation(pretrain_folder, seed=1)(model, CPU, torch.float32) != pytest.approx(
            first, rel=1e-6
        )


@pytest.mark.parametrize("is_causal", [False, True])
def test_it_never_has_all_logits(
    pretrain_folder: Any,
    make_config: Callable,
    monkeypatch: pytest.MonkeyPatch,
    largest: Callable,
    is_causal: bool,
) -> None:
    """Of a vocabulary that is much wider than anything else."""
    knobs = {"kind": "autoregressive"} if is_causal else {}
    model, V = Transformer(make_config(causal=is_causal, vocab_size=2000)[0]), 2000
    model.init_weights(0)
    fixed = validation(pretrain_folder, rows=8, micro_rows=8, **knobs)
    first = fixed(model, CPU, torch.float32)
    monkeypatch.setitem(SLICE, "cpu", 5 * V)
    with largest() as seen:
        assert fixed(model, CPU, torch.float32) == pytest.approx(first, rel=1e-6)
    assert seen.numbers <= model.embed.weight.numel() < 64 * V  # of 128 positions


def test_validation_is_unbiased(pretrain_folder: Any, network: Transformer) -> None:
    """Over many seeds it averages to what many masks of every row say."""
    values = torch.tensor(
        [validation(pretrain_folder, seed=s)(network, CPU, torch.float32) for s in range(60)]
    )
    from llada.diffusion.likelihood import perplexity_bound

    rows = validation(pretrain_folder).batch
    exact = perplexity_bound(
        network, rows.tokens, num_samples=60, maskable=rows.maskable, segment_ids=rows.segment_ids
    ).nats_per_token
    error = values.std().item() * (2 / 60) ** 0.5
    assert values.mean().item() == pytest.approx(exact, abs=4 * error)
    assert error < 0.02 * exact


def test_fine_tuning_scores_the_answer_only(sft_folder: Any, network: Transformer) -> None:
    fixed = validation(sft_folder, rows=7)
    lengths = fixed.batch.tokens.shape[1]
    assert lengths < 16  # padded to the longest example
    assert not fixed.batch.maskable[:, 0].any()
    assert np.isfinite(fixed(network, CPU, torch.float32))


def test_unigram_nats_are_the_cross_entropy_of_the_counts(pretrain_folder: Any) -> None:
    fixed = validation(pretrain_folder)
    counts = pretrain_folder.counts + 1
    scored = fixed.batch.tokens[fixed.batch.maskable].numpy()
    expected = -np.log(counts / counts.sum())[scored].mean()
    assert fixed.unigram_nats(pretrain_folder.counts) == pytest.approx(expected)
    assert 2.0 < expected < np.log(12)


def test_an_empty_split_is_refused(pretrain_folder: Any) -> None:
    with pytest.raises(UserError, match="no validation rows"):
        validation(pretrain_folder, rows=0)
