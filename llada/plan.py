"""What a pretraining run needs before it is started: FLOPs, days, memory per GPU. Estimates, with their assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from llada.config import Recipe
from llada.errors import UserError
from llada.hardware import ACCELERATORS

GIB = 1024**3
FP32_BYTES, BF16_BYTES = 4, 2
LAYER_ACTIVATION_BYTES = 34
"""Kept for the backward pass of one layer, per element of (rows, length, d_model): Korthikanti et al. 2022
(arXiv 2205.05198, Eq. 1) without its attention matrix, which fused kernels do not keep."""
LAYER_INPUT_BYTES = BF16_BYTES
"""What is left of that with activation checkpointing: the layer's input."""
LOGIT_BYTES = BF16_BYTES + FP32_BYTES
"""The head's output and the copy that the cross-entropy takes of it."""
PREDICTED_SHARE = 1 / 2
"""Of the positions, on average over noise levels: only these get logits."""
GATHERED_LAYERS = 2
"""Held whole at a time under FSDP: the one that computes and the one that is fetched meanwhile."""
USABLE_MEMORY = 0.92
"""Share of a device's memory; the rest goes to the driver, communication buffers and fragmentation."""


@dataclass(frozen=True)
class RunCost:
    """An estimate, for `gpus` devices of the kind `gpu` at the utilisation `mfu`."""

    parameters: int
    non_embedding_parameters: int
    tokens: int
    """Trained on, all epochs."""
    flops: float
    days: float
    tokens_per_second_per_gpu: float
    state_gib: float
    """Weights, gradients and optimizer state on one GPU."""
    activation_gib: float
    """Of one micro-batch."""
    fits: bool
    """Into the memory of each GPU."""
    gpus: int
    gpu: str
    mfu: float
    """Model FLOPs utilisation, in [0, 1]."""
    memory_gib: float
    """Of one GPU."""


def estimate_cost(recipe: Recipe, *, gpus: int, gpu: str, mfu: float) -> RunCost:
    """The cost of `recipe.pretrain` on `gpus` GPUs at an assumed utilisation.

    Memory: float32 master weights, gradients and two Adam moments (one with Muon), sharded evenly, the largest gathered
    weights in bf16; activations as one tensor of (rows, length, d_model) per layer with activation checkpointing, all
    that a layer keeps without, and logits of half the positions.

    Raises UserError: a GPU that is not in the table, or a recipe that counts epochs.
    """
    accelerator = ACCELERATORS.find(gpu.lower())
    model, run = recipe.model, recipe.pretrain
    if run.train.num_steps is None:
        raise UserError("the recipe counts epochs: set pretrain.train.num_steps in its JSON file to plan it")
    length = recipe.prepare.row_length
    tokens = run.train.num_steps * run.train.global_batch_tokens
    flops = model.training_flops_per_token(length) * tokens
    rate = gpus * accelerator.bf16_flops * mfu

    moments = 1 if run.optim.optimizer == "muon" else 2
    layer = (model.num_non_embedding_parameters - model.d_model) / model.num_layers
    embeddings = model.num_parameters - model.num_non_embedding_parameters
    gathered = BF16_BYTES * (GATHERED_LAYERS * layer + embeddings) if gpus > 1 else 0
    state = model.num_parameters * FP32_BYTES * (2 + moments) / gpus + gathered

    copies = 1 if model.block_length is None else 2  # block diffusion runs a row noised and clean
    elements = copies * run.train.micro_batch_rows * length * model.d_model
    per_layer = LAYER_INPUT_BYTES if run.train.activation_checkpointing == "full" else LAYER_ACTIVATION_BYTES
    # One layer more: the one whose activations are computed again in the backward pass.
    activations = elements * (model.num_layers * per_layer + LAYER_ACTIVATION_BYTES)
    logits = run.train.micro_batch_rows * length * PREDICTED_SHARE * model.vocab_size * LOGIT_BYTES
    return RunCost(
        parameters=model.num_parameters,
        non_embedding_parameters=model.num_non_embedding_parameters,
        tokens=tokens,
        flops=flops,
        days=flops / rate / 86_400,
        tokens_per_second_per_gpu=rate / gpus / model.training_flops_per_token(length),
        state_gib=state / GIB,
        activation_gib=(activations + logits) / GIB,
        fits=(state + activations + logits) / GIB < USABLE_MEMORY * accelerator.memory_gib,
        gpus=gpus,
        gpu=gpu.lower(),
        mfu=mfu,
        memory_gib=accelerator.memory_gib,
    )


def format_cost(cost: RunCost) -> str:
    """The estimate as a few lines of text."""
    need = cost.state_gib + cost.activation_gib
    return "\n".join(
        [
            f"parameters            {cost.parameters:,} ({cost.non_embedding_parameters:,} without embeddings)",
            f"tokens                {cost.tokens:,}",
            f"training FLOPs        {cost.flops:.3g}",
            f"time on {cost.gpus} × {cost.gpu:<10} {cost.days:,.1f} days at {cost.mfu:.0%} MFU "
            f"({cost.tokens_per_second_per_gpu:,.0f} tokens/s per GPU, {cost.days * 24 * cost.gpus:,.0f} GPU-hours)",
            f"memory per GPU        {need:.1f} of {cost.memory_gib:.0f} GiB "
            f"({cost.state_gib:.1f} state, {cost.activation_gib:.1f} activations)"
            + ("" if cost.fits else " — does not fit: use more GPUs or a smaller train.micro_batch_rows"),
        ]
    )
