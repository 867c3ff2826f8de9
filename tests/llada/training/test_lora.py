"""Fine-tuning with adapters in the training loop: what moves, what a checkpoint holds, what it may go on with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from llada.data.tokens.shards import TokenDataset
from llada.errors import UserError
from llada.model.lora import LoraConfig, MergedWeights, num_adapter_parameters, training_flops
from llada.model.transformer import ModelConfig
from llada.training.batches import BatchStream
from llada.training.checkpoint.restore import restore
from llada.training.optim import build_optimizers, step_all
from llada.training.parallel import build_parallel
from llada.training.trainer import train_step

RANK = 4


@pytest.fixture(scope="session")
def base(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path_factory: Any
) -> dict[str, Tensor]:
    """A network that has learnt to count, from text alone."""
    configs = make_config(num_steps=120, log_every=60, optimizer="muon", muon_lr=0.03, eps=1e-8)
    return run_here(configs, pretrain_folder, tmp_path_factory.mktemp("base")).state


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"optimizer": "muon", "targets": ("q_proj", "down_proj"), "rslora": True},
        {"precision": "bf16", "tie_embeddings": True, "ema_decay": 0.5},
    ],
    ids=str,
)
def test_resuming_equals_never_stopping(
    make_config: Callable,
    run_here: Callable,
    sft_folder: Any,
    random_weights: Callable,
    tmp_path: Path,
    knobs: dict[str, Any],
) -> None:
    configs = make_config(rank=RANK, num_steps=6, checkpoint_every=2, validate_every=4, **knobs)
    start = random_weights(configs[0])
    whole = run_here(configs, sft_folder, tmp_path / "whole", initial_state=start)
    first = run_here(configs, sft_folder, tmp_path / "parts", initial_state=start, stop_at=3)
    second = run_here(configs, sft_folder, tmp_path / "parts", initial_state=start)
    assert second.events[0].first_step == 3
    assert first.losses + second.losses == whole.losses
    assert second.result.validation_loss == whole.result.validation_loss
    assert_equal(second.state, whole.state)
    assert set(whole.state) == {
        f"layers.{i}.{name}.{matrix}"
        for i in range(2)
        for name in configs[1].lora.targets
        for matrix in ("lora_A", "lora_B")
    }
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in whole.state.values())


def test_the_first_loss_is_the_base_networks(
    make_config: Callable, run_here: Callable, sft_folder: Any, random_weights: Callable, tmp_path: Path
) -> None:
    for precision in ("fp32", "bf16"):
        configs = make_config(num_steps=1, precision=precision)
        start = random_weights(configs[0])
        full = run_here(configs, sft_folder, tmp_path / precision, initial_state=start)
        adapted = make_config(num_steps=1, precision=precision, rank=RANK)
        run = run_here(adapted, sft_folder, tmp_path / f"{precision}-lora", initial_state=start)
        assert run.losses == full.losses


@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_adapters_move(
    make_config: Callable,
    sft_folder: Any,
    random_weights: Callable,
    tmp_path: Path,
    dtype: torch.dtype,
    recomputed: str,
) -> None:
    """All of them, also in the first block, whose input needs no gradient, and where blocks are computed again."""
    model_config, config = make_config(rank=RANK)
    model = build_parallel(
        model_config,
        torch.device("cpu"),
        dtype,
        recomputed=recomputed,
        lora=config.lora,
    )
    optimizers = build_optimizers(model, config.optim)
    start = random_weights(model_config)
    restore(str(tmp_path), {}, model, optimizers, initial_state=start, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dataset = TokenDataset(sft_folder.url)
    stream = BatchStream(
        dataset, config.objective, model_config, global_rows=8, micro_rows=4, seed=0, rank=0, num_workers=1
    )
    for batch in stream.batches(0, 3):
        train_step(model, batch, 1, dtype)
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {
            name for name in before if "lora_" in name
        }
        step_all(optimizers, skipped=torch.zeros(()))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert not torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, before[name]), name
            assert torch.equal(parameter, start[name].to(parameter.dtype)), name
            assert parameter.dtype == (dtype if parameter.ndim == 2 else torch.float32)


def test_it_learns_and_the_merged_network_has_its_bound(
    make_config: Callable, run_here: Callable, sft_folder: Any, base: dict[str, Tensor], tmp_path: Path
) -> None:
    options = {"log_every": 30, "lr": 0.01, "eps": 1e-8}
    still = run_here(make_config(num_steps=1, lr=1e-12), sft_folder, tmp_path / "still", initial_state=base)
    configs = make_config(num_steps=120, rank=RANK, **options)
    run = run_here(configs, sft_folder, tmp_path / "lora", initial_state=base)
    assert run.losses[-1] < run.losses[0]
    assert run.result.validation_loss < 0.8 * still.result.validation_loss
    merged = MergedWeights(base, run.state, configs[1].lora.scale)
    plain = make_config(num_steps=1, lr=1e-12)
    again = run_here(plain, sft_folder, tmp_path / "merged", initial_state=merged)
    assert again.result.validation_loss == pytest.approx(run.result.validation_loss, rel=1e-4)


def test_a_checkpoint_holds_the_adapters_alone(
    make_config: Callable, run_here: Callable, sft_folder: Any, random_weights: Callable, tmp_path: Path
) -> None:
    """16 bytes a trained weight: itself and AdamW's two moments are 12, and its gradient is not kept."""
    configs = make_config(rank=RANK, num_steps=1)
    run_here(configs, sft_folder, tmp_path, initial_state=random_weights(configs[0]))
    stored = FileSystemReader(tmp_path / "step-00000001").read_metadata().state_dict_metadata
    tensors = {name for name in stored if not name.endswith(".step")}
    adapters = [name for name, p in lora_parameters(*configs)]
    assert tensors == {f"model.{name}" for name in adapters} | {
        f"optim.{name}.{slot}" for name in adapters for slot in ("exp_avg", "exp_avg_sq")
    }
    numbers = sum(stored[name].size.numel() for name in tensors)
    assert numbers == 3 * num_adapter_parameters(configs[1].lora, configs[0])


def lora_parameters(model_config: ModelConfig, config: Any) -> list[tuple[str, Tensor]]:
    model = build_parallel(model_config, torch.device("cpu"), torch.float32, lora=config.lora)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"rank": 4}, {"rank": 3}),
        ({"rank": 4}, {"rank": 4, "alpha": 5.0}),
        ({"rank": 4}, {"rank": 4, "rslora": True}),
        ({"rank": 4}, {"rank": 4, "targets": ("q_proj",)}),
        ({"rank": 4}, {}),
        ({}, {"rank": 4}),
    ],
    ids=str,
)
def test_other_adapters_are_another_run(
    make_config: Callable,
    run_here: Callable,
    sft_folder: Any,
    random_weights: Callable,
    tmp_path: Path,
    before: dict,
    now: dict,
) -> None:
    configs = make_config(num_steps=1, **before)
    start = random_weights(configs[0])
    run_here(configs, sft_folder, tmp_path, initial_state=start)
    with pytest.raises(UserError, match=r"are of another run \(lora differ\)"):
        run_here(make_config(num_steps=2, **now), sft_folder, tmp_path, initial_state=start)


def test_another_base_is_another_run(
    make_config: Callable, run_here: Callable, sft_folder: Any, random_weights: Callable, tmp_path: Path
) -> None:
    """The same settings spelled otherwise are not."""
    configs = make_config(num_steps=1, rank=4, targets=("q_proj", "k_proj"))
    start = random_weights(configs[0])
    run_here(configs, sft_folder, tmp_path, initial_state=start)
    other = {**start, "layers.1.o_proj.weight": start["layers.1.o_proj.weight"] * 1.01}
    with pytest.raises(UserError, match=r"another run \(lora differ\)"):
        run_here(configs, sft_folder, tmp_path, initial_state=other)
    spelled = make_config(num_steps=2, rank=4, alpha=8.0, targets=("k_proj", "q_proj"))
    assert run_here(spelled, sft_folder, tmp_path, initial_state=start).events[0].first_step == 1


def test_what_cannot_be_is_refused(
    make_config: Callable, run_here: Callable, sft_folder: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="lora: rank 17 is more than q_proj"):
        run_here(make_config(rank=17), sft_folder, tmp_path)
    with pytest.raises(UserError, match="float8 and lora.rank do not go together"):
        make_config(rank=4, float8=True)
    with pytest.raises(UserError, match="lora: adapters need a trained network"):
        run_here(make_config(rank=4), sft_folder, tmp_path)


def test_frozen_weights_cost_a_third_less(make_config: Callable) -> None:
    model, _ = make_config()
    config = LoraConfig(rank=2, targets=("q_proj",))
    full, row = model.training_flops_per_token(16), 16
    attention = full - model.training_flops_per_token(0)
    assert training_flops(model, LoraConfig(), row) == full
    adapters = 2 * 2 * (16 + 16)
    assert training_flops(model, config, row) == pytest.approx(
        (full - attention) * 2 / 3 + attention + 6 * adapters
    )
