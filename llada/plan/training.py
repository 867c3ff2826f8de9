"""FLOPs, days and memory per GPU of a pretraining run. Estimates, with their assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from llada.config import Recipe
from llada.errors import UserError
from llada.hardware import ACCELERATORS
from llada.plan.published import FLOAT8_SPEED_UP, mfu_range
from llada.training.memory import (
    GIB,
    StepMemory,
    Worker,
    checkpoint_bytes,
    host_memory,
    micro_batches,
    remedies,
    step_memory,
)

USABLE_MEMORY = 0.92
"""Share of a device's memory; the rest goes to the driver, communication buffers and fragmentation."""


@dataclass(frozen=True)
class TrainingCost:
    """An estimate, for `gpus` devices of the kind `gpu` at the utilisation `mfu`."""

    parameters: int
    non_embedding_parameters: int
    tokens: int
    """Trained on, all epochs."""
    flops: float
    days: float
    """Of steps; failures come on top (failures.py)."""
    days_range: tuple[float, float]
    """By the utilisations of the published runs (published.py), and by `mfu`."""
    tokens_per_second_per_gpu: float
    micro_batches: int
    """Of one GPU in a step."""
    micro_rows: int
    """Of the largest."""
    filler: float
    """Share of all rows that only fill up where the batch does not divide: they cost time and teach nothing."""
    memory: StepMemory
    """Of one GPU, where a step is fullest."""
    fits: bool
    """Into the memory of each GPU."""
    remedy: str
    """The setting that lowers it most."""
    checkpoint_gib: float
    """A resumable checkpoint in its store."""
    host_gib: float
    """Of each GPU's host: the batches that are made ahead and a copy of its part of a checkpoint."""
    gpus: int
    gpu: str
    mfu: float
    """Model FLOPs utilisation, in [0, 1]; float8 is that much faster on top (published.py)."""
    memory_gib: float
    """Of one GPU."""


def estimate_training(recipe: Recipe, *, gpus: int, gpu: str, mfu: float) -> TrainingCost:
    """The cost of `recipe.pretrain` on `gpus` GPUs at an assumed utilisation.

    Rows are shared out as the trainer does it, and memory is counted as llada/training/memory.py says, at bf16.

    Raises UserError: a GPU that is not in the table, or a recipe that counts epochs.
    """
    accelerator = ACCELERATORS.find(gpu.lower())
    model, run = recipe.model, recipe.pretrain
    if run.train.num_steps is None:
        raise UserError("the recipe counts epochs: set pretrain.train.num_steps in its JSON file to plan it")
    length = recipe.prepare.row_length
    tokens = run.train.num_steps * run.train.global_batch_tokens
    flops = model.training_flops_per_token(length) * tokens
    speed_up = FLOAT8_SPEED_UP if run.train.float8 else 1.0
    rate = gpus * accelerator.bf16_flops * mfu * speed_up
    lowest, highest = mfu_range()

    number, rows = micro_batches(run.train, length, gpus)
    global_rows = run.train.global_batch_tokens // length
    filler = 1 - global_rows / (-(-global_rows // gpus) * gpus)
    days = flops / rate / (1 - filler) / 86_400
    worker = Worker(num_workers=gpus)
    memory = step_memory(model, run, worker, row_length=length)[0]
    best = remedies(model, run, worker, row_length=length)
    return TrainingCost(
        parameters=model.num_parameters,
        non_embedding_parameters=model.num_non_embedding_parameters,
        tokens=tokens,
        flops=flops,
        days=days,
        days_range=(days * mfu / max(highest, mfu), days * mfu / min(lowest, mfu)),
        tokens_per_second_per_gpu=rate * (1 - filler) / gpus / model.training_flops_per_token(length),
        micro_batches=number,
        micro_rows=rows,
        filler=filler,
        memory=memory,
        fits=memory.total / GIB < USABLE_MEMORY * accelerator.memory_gib,
        remedy=best[0][0] if best else "shorter rows",
        checkpoint_gib=checkpoint_bytes(model, run) / GIB,
        host_gib=sum(host_memory(model, run, worker, row_length=length)) / GIB,
        gpus=gpus,
        gpu=gpu.lower(),
        mfu=mfu,
        memory_gib=accelerator.memory_gib,
    )
