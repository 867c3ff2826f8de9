"""From step numbers to rows and noise: arithmetic that no worker count, micro-batch or restart can change."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llada.data.tokens.shards import TokenDataset
from llada.diffusion.objective import ObjectiveConfig, add_noise
from llada.diffusion.time import TimeConfig
from llada.errors import UserError
from llada.model.transformer import ModelConfig
from llada.training.batches import PREFETCHED, BatchStream, cut_evenly

EOS, MASK, L = 0, 1, 16
MODEL = ModelConfig(vocab_size=12, d_model=8, num_layers=1, num_heads=1, ffn_dim=8, mask_token_id=MASK)


def stream(
    folder: Any,
    *,
    rank: int = 0,
    workers: int = 1,
    rows: int = 8,
    micro_rows: int | None = None,
    seed: int = 0,
    **knobs: Any,
) -> BatchStream:
    return BatchStream(
        TokenDataset(folder.url),
        ObjectiveConfig(**knobs),
        MODEL,
        global_rows=rows,
        micro_rows=micro_rows or rows,
        seed=seed,
        rank=rank,
        num_workers=workers,
    )


@pytest.mark.parametrize("sampling", ["stratified", "independent", "sobol"])
def test_rows_and_noise_do_not_depend_on_the_workers(pretrain_folder: Any, sampling: str) -> None:
    config = ObjectiveConfig(time=TimeConfig(sampling=sampling))  # type: ignore[arg-type]
    for step in (0, 5, 9):  # beyond the first epoch too
        whole = stream(pretrain_folder).load(step)
        noisy = add_noise(whole, config, 0, MASK)
        assert noisy.masked.any()
        for workers in (2, 4):
            for rank in range(workers):
                part = stream(pretrain_folder, rank=rank, workers=workers).load(step)
                assert torch.equal(part.tokens, whole.tokens[rank::workers])
                assert torch.equal(part.sample_ids, whole.sample_ids[rank::workers])
                pieces = [
                    add_noise(micro, config, 0, MASK) for micro in part.split(cut_evenly(len(part.tokens), 3))
                ]
                for name in ("tokens", "masked", "mask_prob", "weight"):
                    joined = torch.cat([getattr(piece, name) for piece in pieces])
                    assert torch.equal(joined, getattr(noisy, name)[rank::workers]), name


def test_an_epoch_holds_every_row_once_and_noise_changes_with_it(pretrain_folder: Any) -> None:
    source = stream(pretrain_folder, rows=1)
    n = len(source.dataset)
    batches = [source.load(step) for step in range(2 * n)]
    ids = [int(batch.sample_ids) for batch in batches]
    assert sorted(ids[:n]) == sorted(ids[n:]) == list(range(n))
    assert ids[:n] != ids[n:]
    assert {int(batch.epochs) for batch in batches[:n]} == {0}
    assert {int(batch.epochs) for batch in batches[n:]} == {1}
    config = ObjectiveConfig(schedule="bert")
    everything = torch.stack([add_noise(b, config, 0, MASK).masked[0] for b in batches])
    first, second = everything[np.argsort(ids[:n])], everything[n + np.argsort(ids[n:])]
    assert not torch.equal(first, second)
    tokens = torch.cat([batch.tokens for batch in batches])
    assert torch.equal(tokens[np.argsort(ids[:n])], tokens[n + np.argsort(ids[n:])])


def test_batches_come_in_order_from_any_step(pretrain_folder: Any) -> None:
    source = stream(pretrain_folder)
    last = PREFETCHED + 3
    whole = [(b.step, b.micro[0].tokens) for b in source.batches(0, last)]
    resumed = [(b.step, b.micro[0].tokens) for b in source.batches(4, last)]
    assert [step for step, _ in whole] == list(range(last))
    for (step, a), (other, b) in zip(whole[4:], resumed, strict=True):
        assert step == other
        assert torch.equal(a, b)
    assert list(source.batches(6, 6)) == []
    assert source.read_wait() > 0
    assert source.read_wait() == 0


def test_times_of_a_batch_are_stratified_over_all_workers(pretrain_folder: Any) -> None:
    levels = [
        add_noise(stream(pretrain_folder, rank=r, workers=4).load(3), ObjectiveConfig(), 0, MASK).mask_prob
        for r in range(4)
    ]
    t = (torch.cat(levels) - 1e-3) / 0.999
    assert sorted((t * 8).long().tolist()) == list(range(8))


def test_fine_tuning_never_noises_the_prompt_and_learns_the_padding(sft_folder: Any) -> None:
    source = stream(sft_folder)
    config = ObjectiveConfig(schedule="bert", time=TimeConfig())
    masked_padding = 0
    for step in range(4):
        batch = source.load(step)
        lengths = source.dataset.lengths(batch.sample_ids.numpy())
        assert batch.tokens.shape[1] == lengths.max()  # padded to the longest of the global batch
        assert batch.per_row
        assert batch.segment_ids is None
        full = source.dataset.rows(batch.sample_ids.numpy())
        assert torch.equal(batch.maskable, torch.from_numpy(full.maskable[:, : lengths.max()]))
        for seed in range(5):
            noisy = add_noise(batch, config, seed, MASK)
            prompt = ~batch.maskable
            assert torch.equal(noisy.tokens[prompt], batch.tokens[prompt])
            assert not noisy.masked[prompt].any()
            padding = torch.arange(batch.tokens.shape[1]) >= torch.from_numpy(lengths)[:, None]
            assert (batch.tokens[padding] == EOS).all()
            masked_padding += int(noisy.masked[padding].sum())
    assert masked_padding > 0


def test_unified_fine_tuning_is_pretraining_on_dialogues(unified_folder: Any) -> None:
    """iLLaDA: prompts are noised too, dialogues in a row do not see each other, and the row is not divided by itself."""
    source = stream(unified_folder, rows=len(TokenDataset(unified_folder.url)))
    batch = source.load(0)
    full = source.dataset.rows(batch.sample_ids.numpy())
    assert torch.equal(batch.segment_ids, torch.from_numpy(full.segment_ids))
    assert torch.equal(batch.maskable, torch.from_numpy(full.segment_ids >= 0))  # all but the padding
    assert 0 < (~batch.maskable).sum() < L
    assert batch.segment_ids.max() > 0
    assert not batch.per_row


def test_padding_of_a_fine_tuning_batch_is_that_of_all_workers(sft_folder: Any) -> None:
    widths = {stream(sft_folder, rank=r, workers=4).load(2).tokens.shape[1] for r in range(4)}
    assert widths == {stream(sft_folder).load(2).tokens.shape[1]}


def test_random_length_cuts_some_steps_the_same_everywhere(pretrain_folder: Any) -> None:
    def width(step: int, **knobs: Any) -> int:
        return stream(pretrain_folder, random_length=0.3, **knobs).load(step).tokens.shape[1]

    widths = [width(step) for step in range(60)]
    cut = [w for w in widths if w < L]
    assert 8 <= len(cut) <= 28  # 60 × 0.3 × 15/16 = 17 ± 3.5, three deviations
    assert len(set(cut)) > 4
    assert min(widths) >= 1
    assert widths == [width(step, rank=1, workers=2) for step in range(60)]
    assert widths != [width(step, seed=1) for step in range(60)]
    assert {stream(pretrain_folder).load(step).tokens.shape[1] for step in range(20)} == {L}
    everything = [
        stream(pretrain_folder, random_length=1.0).load(step).tokens.shape[1] for step in range(200)
    ]
    assert set(everything) == set(range(1, L + 1))


@pytest.mark.parametrize("data", ["pretrain", "sft"])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 11])
def test_any_number_of_workers_shares_out_a_batch(
    pretrain_folder: Any, sft_folder: Any, data: str, workers: int
) -> None:
    """Each has as many micro-batches of the same sizes, and every row is learned from once, by whatever it counts."""
    folder = pretrain_folder if data == "pretrain" else sft_folder
    (alone,) = stream(folder).prepare(3).micro
    parts = [stream(folder, rank=r, workers=workers, micro_rows=2).prepare(3) for r in range(workers)]
    assert len({tuple(micro.tokens.shape for micro in part.micro) for part in parts}) == 1
    learned = [
        (int(target), float(scale), tuple(micro.tokens[int(position) // micro.tokens.shape[1]].tolist()))
        for micro in [alone, *(micro for part in parts for micro in part.micro)]
        for position, target, scale in zip(micro.positions, micro.targets, micro.scale, strict=True)
        if scale > 0
    ]
    assert len(learned) % 2 == 0
    assert sorted(learned[: len(learned) // 2]) == sorted(learned[len(learned) // 2 :])
    if data == "pretrain":
        assert sum(int(part.counted) for part in parts) == 8 * L


def test_micro_batches_are_cut_evenly() -> None:
    for rows in range(1, 30):
        for at_most in range(1, 12):
            sizes = cut_evenly(rows, at_most)
            assert sum(sizes) == rows
            assert len(sizes) == -(-rows // at_most)
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)


def test_a_row_that_fails_to_load_fails_the_loop(pretrain_folder: Any, tmp_path: Path) -> None:
    """And not alone the thread that loads ahead of it."""
    copy = shutil.copytree(pretrain_folder.url, tmp_path / "copy")
    source = stream(dataclasses.replace(pretrain_folder, url=str(copy)))
    shutil.rmtree(copy / "train")
    with pytest.raises(UserError, match="missing shard"):
        next(source.batches(0, 9))


def test_an_end_does_not_wait_for_rows_that_do_not_come(pretrain_folder: Any) -> None:
    """Neither that of the loop nor that of the process: a store that is away is waited for half an hour."""
    script = """
import sys, threading
from llada.data.tokens.shards import TokenDataset
from llada.diffusion.objective import ObjectiveConfig
from llada.model.transformer import ModelConfig
from llada.training.batches import BatchStream

class Away(TokenDataset):
    asked = threading.Event()

    def rows(self, *indices):
        if self.asked.is_set():
            threading.Event().wait()
        self.asked.set()
        return super().rows(*indices)

shape = dict(global_rows=2, micro_rows=2, seed=0, rank=0, num_workers=1)
model = ModelConfig(12, 8, 1, 1, 8, mask_token_id=1)
batches = BatchStream(Away(sys.argv[1]), ObjectiveConfig(), model, **shape).batches(0, 9)
next(batches)
batches.close()
"""
    subprocess.run([sys.executable, "-c", script, pretrain_folder.url], timeout=240, check=True)
