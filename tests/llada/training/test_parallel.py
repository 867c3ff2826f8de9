"""One worker or two: the same losses, weights and validation, and checkpoints that move between them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.model.transformer import ModelConfig, Transformer
from llada.training.events import StepDone
from llada.training.optim import ShardedMuon

pytestmark = pytest.mark.integration  # two processes, about 15 s

JOBS: dict[str, dict[str, Any]] = {
    "masked diffusion, Muon, micro-batches": {
        "optimizer": "muon",
        "micro_batch_rows": 3,
        "random_length": 0.5,
    },
    "masked diffusion, tied, independent times": {
        "tie_embeddings": True,
        "schedule": "loglinear",
        "subs": True,
        "document_mask": False,
        "num_kv_heads": 1,
    },
    "bf16, activation checkpointing": {"precision": "bf16", "activation_checkpointing": True, "num_steps": 2},
    "fine-tuning": {"data": "sft"},
    "autoregressive": {"kind": "autoregressive", "causal": True},
    "block diffusion": {"kind": "block_diffusion", "block_length": 4, "activation_checkpointing": True},
}
MUON = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
# Odd and even rows, fewer rows than workers, an odd number of them.
SHAPES = [(5, 7), (8, 4), (3, 3), (1, 6), (6, 2)]


def muon_job() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    grads = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(3)]
    return {"weights": weights, "grads": grads, **MUON}


@pytest.fixture(scope="module")
def both(
    make_config: Callable,
    run_here: Callable,
    run_on_two_workers: Callable,
    pretrain_folder: Any,
    sft_folder: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Every job's answer of one worker and of two: {"one": …, "two": …, "checkpoints": folder}."""
    home: Path = tmp_path_factory.mktemp("both")
    one: dict[str, Any] = {}
    jobs: dict[str, dict[str, Any]] = {"muon": muon_job()}

    def job(name: str, configs: tuple, folder: Any, **options: Any) -> None:
        jobs[name] = {
            "model_config": configs[0],
            "config": configs[1],
            "data": folder.url,
            "checkpoints": str(home / "two" / name),
            "unigram_counts": folder.counts,
            **options,
        }

    for name, changes in JOBS.items():
        knobs = dict(changes)
        folder = sft_folder if knobs.pop("data", "") == "sft" else pretrain_folder
        configs = make_config(**{"num_steps": 3, **knobs})
        one[name] = run_here(configs, folder, home / "one" / name)
        job(name, configs, folder)
    resumable = make_config(optimizer="muon", tie_embeddings=True)
    one["whole"] = run_here(resumable, pretrain_folder, home / "whole")
    run_here(resumable, pretrain_folder, home / "1 then 2", stop_at=3)
    job("1 then 2", resumable, pretrain_folder, checkpoints=str(home / "1 then 2"))
    job("2 then 1", resumable, pretrain_folder, checkpoints=str(home / "2 then 1"), stop_at=3)
    job("odd", make_config(global_batch_tokens=7 * 16), pretrain_folder)
    two = run_on_two_workers(jobs)
    one["2 then 1"] = run_here(resumable, pretrain_folder, home / "2 then 1")
    return {"one": one, "two": two}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    """Float32 sums in another order, enlarged by a few steps of size 0.01."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_moved_alike(a: dict[str, Tensor], b: dict[str, Tensor], model: ModelConfig) -> None:
    """Muon casts gradients to bfloat16 (where the hardware has it) and blows up their smallest singular directions to full size: there, rounding in
    the last bit of float32 moves a few per cent of a step. In bfloat16, Adam makes a whole step of the sign of a gradient near
    zero. So: the two moved the same way, to within a tenth.
    """
    start = Transformer(model)
    start.init_weights(0)
    for name, p in start.named_parameters():
        moved = (b[name] - p).norm()
        assert moved > 1e-3, name
        assert (a[name] - b[name]).norm() < 0.1 * moved, name


@pytest.mark.parametrize("name", list(JOBS))
def test_two_workers_train_as_one(both: dict[str, Any], name: str) -> None:
    alone = both["one"][name]
    result, events = both["two"][name]
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    # bf16 rounds every activation.
    rounding = "bf16" in name
    assert losses == pytest.approx(alone.losses, rel=2e-2 if rounding else 2e-4)
    assert len(losses) == len(alone.losses) > 1
    assert result.validation_loss == pytest.approx(
        alone.result.validation_loss, rel=2e-2 if rounding else 2e-4
    )
    assert result.unigram_loss == alone.result.unigram_loss
    assert result.tokens == alone.result.tokens
    if "Muon" in name or rounding:
        assert_moved_alike(result.state, alone.result.state, alone.model)
    else:
        assert_close(result.state, alone.result.state, atol=4e-4)


def test_a_checkpoint_moves_between_one_and_two_workers(both: dict[str, Any]) -> None:
    whole = both["one"]["whole"]
    grown, events = both["two"]["1 then 2"]
    assert events[0].first_step == 3
    assert events[0].workers == 2
    shrunk = both["one"]["2 then 1"]
    assert shrunk.events[0].first_step == 3
    for result in (grown, shrunk.result):
        assert result.num_steps == 6
        assert result.tokens == whole.result.tokens
        assert result.validation_loss == pytest.approx(whole.result.validation_loss, rel=2e-4)
        assert_moved_alike(result.state, whole.result.state, whole.model)
    assert [e.loss for e in events if isinstance(e, StepDone)] == pytest.approx(whole.losses[3:], rel=2e-4)


def test_an_indivisible_batch_is_refused_on_both(both: dict[str, Any]) -> None:
    assert "7 rows" in both["two"]["odd"]
    assert "2 workers" in both["two"]["odd"]


def test_sharded_muon_equals_whole_matrices(both: dict[str, Any]) -> None:
    job = muon_job()
    params = [torch.nn.Parameter(w.clone()) for w in job["weights"]]
    optimizer = ShardedMuon(params, **MUON)
    for grads in job["grads"]:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    for got, want in zip(both["two"]["muon"], params, strict=True):
        # The same products, worker by worker.
        torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6)
