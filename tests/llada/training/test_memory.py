"""What a step is counted to need: the measured peak, and what follows for the settings."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llada.errors import UserError
from llada.model.lora import LoraConfig, num_adapter_parameters
from llada.presets import get_preset
from llada.training.memory import (
    GIB,
    OutOfMemoryError,
    Worker,
    checkpoint_bytes,
    host_memory,
    micro_batches,
    out_of_memory_message,
    remedies,
    step_memory,
)
from llada.training.optim import OptimConfig

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from plan_memory import Case, measure

LLADA = get_preset("llada_8b")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("wide vocabulary", torch.bfloat16, micro_batches=2), marks=pytest.mark.slow),
        Case("tied", torch.float32, "selective"),
        Case("grouped queries, wide SwiGLU", torch.bfloat16, "full", document_mask=False),
        Case("deep", torch.float32, "full", 2, optim=OptimConfig(optimizer="muon")),
        Case("normed heads", torch.bfloat16, lora=LoraConfig(rank=16)),
        Case("wide vocabulary", torch.bfloat16, validated=True),
    ],
    ids=lambda case: f"{case.network}-{case.recomputed}-{case.lora.rank}-{case.validated}",
)
def test_the_count_is_the_measured_peak(case: Case) -> None:
    """Within 2 %: statistics of rows, indices and seeds are not counted, and are 1 % of steps that are as small as these."""
    assert abs(measure(case)["error"]) < 0.02


def test_the_fullest_moment_is_first_and_its_parts_add_up() -> None:
    moments = step_memory(LLADA.model, LLADA.pretrain, Worker(64), row_length=4096)
    totals = [memory.total for memory in moments]
    assert totals == sorted(totals, reverse=True)
    for memory in moments:
        parts = [value for name, value in vars(memory).items() if name != "moment"]
        assert memory.total == pytest.approx(sum(parts))


def test_state_is_shared_out_and_gathered_weights_are_not() -> None:
    def at_head(workers: int, shard_workers: int | None = None) -> Any:
        train = dataclasses.replace(LLADA.pretrain.train, shard_workers=shard_workers)
        run = dataclasses.replace(LLADA.pretrain, train=train)
        moments = step_memory(LLADA.model, run, Worker(workers), row_length=4096)
        return next(memory for memory in moments if memory.moment == "head")

    few, many = at_head(8), at_head(64)
    for name in ("weights", "optimizer", "gradients"):
        assert getattr(few, name) == 8 * getattr(many, name)
    # In bf16: the head, and the message of the last layer; the embedding was given back behind its forward.
    head, norm = LLADA.model.vocab_size * LLADA.model.d_model, LLADA.model.d_model
    layer = (LLADA.model.num_non_embedding_parameters - norm) / LLADA.model.num_layers
    assert few.copies == many.copies == 2 * (head + layer)
    hybrid = at_head(64, 8)
    assert (hybrid.weights, hybrid.optimizer) == (few.weights, few.optimizer)


@pytest.mark.parametrize("workers", [1, 7, 64, 96, 512, 2000])
def test_every_number_of_workers_has_its_micro_batches(workers: int) -> None:
    number, rows = micro_batches(LLADA.pretrain.train, 4096, workers)
    assert number * rows * workers >= 1280
    assert rows <= LLADA.pretrain.train.micro_batch_rows


def test_checkpoints_hold_weights_moments_and_the_average() -> None:
    parameters, matrices = (
        LLADA.model.num_parameters,
        LLADA.model.num_non_embedding_parameters - LLADA.model.d_model,
    )

    def numbers(**knobs: Any) -> float:
        train = dataclasses.replace(LLADA.pretrain.train, ema_decay=knobs.pop("ema_decay", None))
        run = dataclasses.replace(LLADA.pretrain, optim=OptimConfig(**knobs), train=train)
        return checkpoint_bytes(LLADA.model, run)

    assert numbers() == 12 * parameters
    assert numbers(moments="bf16") == 8 * parameters
    assert numbers(optimizer="muon") == 12 * parameters - 4 * matrices
    assert numbers(ema_decay=0.999) == 16 * parameters
    _, copy = host_memory(LLADA.model, LLADA.pretrain, Worker(64), row_length=4096)
    assert copy == checkpoint_bytes(LLADA.model, LLADA.pretrain) / 64


def test_remedies_save_what_they_say_and_change_nothing_that_is_learned() -> None:
    train = dataclasses.replace(
        LLADA.pretrain.train, micro_batch_rows=8, activation_checkpointing="none", shard_workers=8
    )
    run = dataclasses.replace(LLADA.pretrain, train=train)
    found = dict(remedies(LLADA.model, run, Worker(16), row_length=4096))
    assert list(found) == sorted(found, key=lambda text: -found[text])
    assert {text.split()[0] for text in found} == {
        "train.micro_batch_rows",
        "train.activation_checkpointing",
        "train.shard_workers",
    }  # more workers would be more copies
    halved = dataclasses.replace(run, train=dataclasses.replace(train, micro_batch_rows=4))
    before, after = (
        step_memory(LLADA.model, each, Worker(16), row_length=4096)[0].total for each in (run, halved)
    )
    assert found["train.micro_batch_rows 8 → 4"] == before - after > 10 * GIB
    least = dataclasses.replace(
        train, micro_batch_rows=1, activation_checkpointing="full", shard_workers=None
    )
    left = remedies(LLADA.model, dataclasses.replace(run, train=least), Worker(16), row_length=4096)
    assert [text for text, _ in left] == ["workers 16 → 32"]


def test_a_run_without_memory_names_the_settings_that_need_less(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    """Of terabytes that no machine has."""
    configs = make_config(ffn_dim=1 << 38, micro_batch_rows=4, activation_checkpointing="selective")
    with pytest.raises(OutOfMemoryError) as raised:
        run_here(configs, pretrain_folder, tmp_path)
    assert isinstance(raised.value, UserError)
    message = str(raised.value)
    assert "\n" not in message
    assert re.match(r"out of memory: a worker needs about [\d.]+ GiB", message)
    for text in ("train.micro_batch_rows 4 → 2: −", "→ full: −", "workers 1 → 2: −"):
        assert text in message


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    """LLaDA-8B with adapters of rank 64: 2 bytes of each weight, 16 of each of 168 M (docstring of llada/model/lora.py)."""
    run = dataclasses.replace(LLADA.sft, lora=LoraConfig(rank=64))
    trained = num_adapter_parameters(run.lora, LLADA.model)
    memory = step_memory(LLADA.model, run, Worker(), row_length=4096)[0]
    assert memory.weights == 2 * LLADA.model.num_parameters + 4 * trained
    assert (memory.optimizer, memory.gradients) == (8 * trained, 4 * trained)
    assert checkpoint_bytes(LLADA.model, run) == 12 * trained
    assert memory.total < 40 * GIB < step_memory(LLADA.model, LLADA.sft, Worker(), row_length=4096)[0].total
    message = out_of_memory_message(LLADA.model, run, Worker(), row_length=4096)
    assert message.startswith("out of memory: a worker needs about ")
    assert "train.micro_batch_rows 2 → 1: −" in message
    assert "workers 1 → 2: −" in message


def test_a_validation_has_no_gradients_and_is_not_the_fullest_moment() -> None:
    """Neither of all weights nor of adapters: what lowers a step's need lowers that of its validations enough."""
    for lora in (LoraConfig(), LoraConfig(rank=64)):
        run = dataclasses.replace(LLADA.sft, lora=lora)
        fullest, *others = step_memory(LLADA.model, run, Worker(), row_length=4096)
        validation = next(memory for memory in others if memory.moment == "validation")
        assert validation.gradients == 0
        assert validation.total < fullest.total
