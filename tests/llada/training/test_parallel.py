"""One worker or several: the same losses, weights and validation, and checkpoints that move between them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.data.tokens.shards import TokenDataset
from llada.diffusion.embedding_noise import EmbeddingNoiseConfig
from llada.model.hf import load_state, read_config
from llada.model.transformer import ModelConfig, Transformer
from llada.training.batches import BatchStream
from llada.training.events import StepDone, StepSkipped
from llada.training.optim import ShardedMuon

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]  # up to five processes

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
        "embedding_noise": EmbeddingNoiseConfig(0.2, 2),
    },
    "bf16, activation checkpointing": {
        "precision": "bf16",
        "activation_checkpointing": "full",
        "num_steps": 2,
    },
    "fine-tuning": {"data": "sft"},
    "adapters, activation checkpointing": {"data": "sft", "rank": 4, "activation_checkpointing": "full"},
    "adapters, bf16, tied": {
        "data": "sft",
        "rank": 4,
        "precision": "bf16",
        "tie_embeddings": True,
        "num_steps": 2,
    },
    "autoregressive": {"kind": "autoregressive", "causal": True},
    "block diffusion": {
        "kind": "block_diffusion",
        "block_length": 4,
        "activation_checkpointing": "selective",
    },
}
# What three and four workers, and five where slow tests are asked for, do with a batch of eight rows.
SHARED_OUT: dict[str, dict[str, Any]] = {
    "masked diffusion": {"optimizer": "muon", "micro_batch_rows": 2},
    "fine-tuning": {"data": "sft", "tie_embeddings": True},
    "autoregressive": {"kind": "autoregressive", "causal": True, "micro_batch_rows": 1},
}
MUON = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
# Odd and even rows, fewer rows than workers, an odd number of them.
SHAPES = [(5, 7), (8, 4), (3, 3), (1, 6), (6, 2)]


def muon_job() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    grads = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(3)]
    return {"weights": weights, "grads": grads, **MUON}


def make_job(configs: tuple, folder: Any, checkpoints: Path, **options: Any) -> dict[str, Any]:
    return {
        "model_config": configs[0],
        "config": configs[1],
        "data": folder.url,
        "checkpoints": str(checkpoints),
        "unigram_counts": folder.counts,
        **options,
    }


@pytest.fixture(scope="module")
def both(
    make_config: Callable,
    run_here: Callable,
    run_on_workers: Callable,
    pretrain_folder: Any,
    sft_folder: Any,
    rare_folder: Any,
    poisoned: Callable,
    random_weights: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Any, Any]:
    """Every job's answer of one worker and of several: {"one": …, 2: …, 3: …}."""
    home: Path = tmp_path_factory.mktemp("both")
    one: dict[str, Any] = {}
    jobs: dict[int, dict[str, dict[str, Any]]] = {2: {"muon": muon_job()}, 3: {}, 4: {}}

    def job(name: str, configs: tuple, folder: Any, workers: int = 2, **options: Any) -> None:
        options = {"checkpoints": home / str(workers) / name, **options}
        jobs[workers][name] = make_job(configs, folder, **options)

    for name, changes in JOBS.items():
        knobs = dict(changes)
        folder = sft_folder if knobs.pop("data", "") == "sft" else pretrain_folder
        configs = make_config(**{"num_steps": 3, **knobs})
        options = {"initial_state": random_weights(configs[0])} if "rank" in knobs else {}
        one[name] = run_here(configs, folder, home / "one" / name, **options)
        job(name, configs, folder, **options)
    resumable = make_config(optimizer="muon", tie_embeddings=True, ema_decay=0.8)
    one["whole"] = run_here(resumable, pretrain_folder, home / "whole")
    run_here(resumable, pretrain_folder, home / "1 then 2", stop_at=3)
    job("1 then 2", resumable, pretrain_folder, checkpoints=str(home / "1 then 2"))
    job("2 then 1", resumable, pretrain_folder, checkpoints=str(home / "2 then 1"), stop_at=3)
    jobs[2]["1 then 2"]["export"] = str(home / "exported")
    asked = [[False] * 6, [False, True, *[False] * 4]]
    job("asked to leave", make_config(), pretrain_folder, checkpoints=str(home / "left"), asked=asked)
    folder, rare = rare_folder
    initial = poisoned(make_config(), rare)
    for optimizer in ("adamw", "muon"):
        configs = make_config(num_steps=10, optimizer=optimizer)
        one[f"skips, {optimizer}"] = run_here(
            configs, folder, home / "skips" / optimizer, initial_state=initial
        )
        job(f"skips, {optimizer}", configs, folder, initial_state=initial)
    for name, changes in SHARED_OUT.items():
        knobs = dict(changes)
        folder = sft_folder if knobs.pop("data", "") == "sft" else pretrain_folder
        configs = make_config(**knobs)
        one[f"shared out, {name}"] = run_here(configs, folder, home / "shared" / name)
        for workers, places in ((3, {}), (4, {"shard_workers": 2})):
            job(f"shared out, {name}", make_config(**knobs, **places), folder, workers)
    job(
        "shared out, masked diffusion",
        make_config(**SHARED_OUT["masked diffusion"], shard_workers=2),
        pretrain_folder,
        3,
    )
    for workers in (2, 4):
        model, config = make_config()
        stream = BatchStream(
            TokenDataset(pretrain_folder.url),
            config.objective,
            model,
            global_rows=8,
            micro_rows=8,
            seed=0,
            rank=0,
            num_workers=1,
        )
        jobs[workers]["gradients"] = {"model": model, "micro": stream.prepare(0).micro[0]}
    several = run_on_workers(jobs)
    one["2 then 1"] = run_here(resumable, pretrain_folder, home / "2 then 1")
    one["asked to leave"] = run_here(make_config(), pretrain_folder, home / "left")
    return {"one": one, "exported": home / "exported", **several}


@pytest.fixture(scope="module")
def five(
    make_config: Callable,
    run_on_workers: Callable,
    pretrain_folder: Any,
    sft_folder: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Five workers' answers to SHARED_OUT."""
    home, jobs = tmp_path_factory.mktemp("five"), {}
    for name, changes in SHARED_OUT.items():
        knobs = dict(changes)
        folder = sft_folder if knobs.pop("data", "") == "sft" else pretrain_folder
        jobs[f"shared out, {name}"] = make_job(make_config(**knobs), folder, home / name)
    return run_on_workers({5: jobs})[5]


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


def assert_adapters_alike(a: dict[str, Tensor], b: dict[str, Tensor], share: float) -> None:
    """All that B has moved from zero, to within a share."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() < share * b[name].norm(), name
    assert len(a) == 2 * 2 * 7


@pytest.mark.parametrize("name", list(JOBS))
def test_two_workers_train_as_one(both: dict[Any, Any], name: str) -> None:
    alone = both["one"][name]
    result, events, state = both[2][name]
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    # bf16 rounds every activation.
    rounding = "bf16" in name
    assert losses == pytest.approx(alone.losses, rel=2e-3 if rounding else 2e-4)
    assert len(losses) == len(alone.losses) > 1
    levels, own = (
        [(e.noise_nats, e.noise_tokens) for e in es if isinstance(e, StepDone)]
        for es in (events, alone.events)
    )
    for (nats, tokens), (own_nats, own_tokens) in zip(levels, own, strict=True):
        assert tokens == own_tokens
        assert nats == pytest.approx(own_nats, rel=5e-3 if rounding else 5e-4)
    assert result.validation_loss == pytest.approx(
        alone.result.validation_loss, rel=2e-3 if rounding else 2e-4
    )
    assert result.unigram_loss == alone.result.unigram_loss
    assert result.tokens == alone.result.tokens
    if "adapters" in name:
        assert_adapters_alike(state, alone.state, 0.1 if rounding else 1e-2)
    elif "Muon" in name or rounding:
        assert_moved_alike(state, alone.state, alone.model)
    else:
        assert_close(state, alone.state, atol=4e-4)


def test_a_checkpoint_moves_between_one_and_two_workers(both: dict[Any, Any]) -> None:
    whole = both["one"]["whole"]
    grown, events, state = both[2]["1 then 2"]
    assert events[0].first_step == 3
    assert events[0].workers == 2
    shrunk = both["one"]["2 then 1"]
    assert shrunk.events[0].first_step == 3
    for result, weights in ((grown, state), (shrunk.result, shrunk.state)):
        assert result.num_steps == 6
        assert result.tokens == whole.result.tokens
        assert result.validation_loss == pytest.approx(whole.result.validation_loss, rel=2e-4)
        assert_moved_alike(weights, whole.state, whole.model)
    assert [e.loss for e in events if isinstance(e, StepDone)] == pytest.approx(whole.losses[3:], rel=2e-4)


def test_what_several_workers_export_is_their_network(both: dict[Any, Any]) -> None:
    _, _, state = both[2]["1 then 2"]
    exported = load_state(both["exported"], *read_config(both["exported"]))
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], state[name]) for name in state)


def test_all_workers_leave_at_the_same_step_when_one_of_them_is_asked(both: dict[Any, Any]) -> None:
    """Worker 1 is asked in the second step; worker 0 hears it in the third."""
    assert both[2]["asked to leave"].startswith("PreemptedError(")
    assert "behind the checkpoint of step 3" in both[2]["asked to leave"]
    assert both["one"]["asked to leave"].events[0].first_step == 3
    assert both["one"]["asked to leave"].result.num_steps == 6


@pytest.mark.parametrize("workers", [3, 4, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(SHARED_OUT))
def test_any_number_of_workers_trains_as_one(
    both: dict[Any, Any], name: str, workers: int, request: pytest.FixtureRequest
) -> None:
    """Of four, two and two share a copy of the state; of three, which cannot be cut so, all."""
    alone = both["one"][f"shared out, {name}"]
    several = request.getfixturevalue("five") if workers == 5 else both[workers]
    result, events, state = several[f"shared out, {name}"]
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert events[0].workers == workers
    assert losses == pytest.approx(alone.losses, rel=2e-4)
    assert result.validation_loss == pytest.approx(alone.result.validation_loss, rel=2e-4)
    assert result.tokens == alone.result.tokens
    assert_moved_alike(state, alone.state, alone.model)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_all_workers_skip_the_step_that_has_no_loss_on_one(both: dict[Any, Any], optimizer: str) -> None:
    alone = both["one"][f"skips, {optimizer}"]
    _, events, state = both[2][f"skips, {optimizer}"]
    skipped = [[e.step for e in some if isinstance(e, StepSkipped)] for some in (alone.events, events)]
    assert skipped[0] == skipped[1] == [4, 9]
    assert [e.loss for e in events if isinstance(e, StepDone)] == pytest.approx(alone.losses, rel=2e-4)
    sound = {name: tensor.nan_to_num() for name, tensor in alone.state.items()}
    assert_moved_alike({name: t.nan_to_num() for name, t in state.items()}, sound, alone.model)


@pytest.mark.parametrize("workers", [2, 4])
def test_nobody_holds_more_of_the_gradients_than_its_share(both: dict[Any, Any], workers: int) -> None:
    """Behind every micro-batch: what FSDP accumulates otherwise is a whole float32 gradient on each."""
    for held in both[workers]["gradients"]:
        assert held == pytest.approx(1 / workers, abs=0.05)  # rows do not always divide


def test_sharded_muon_equals_whole_matrices(both: dict[Any, Any]) -> None:
    job = muon_job()
    params = [torch.nn.Parameter(w.clone()) for w in job["weights"]]
    optimizer = ShardedMuon(params, **MUON)
    for grads in job["grads"]:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    for got, want in zip(both[2]["muon"], params, strict=True):
        # The same products, worker by worker.
        torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6)
