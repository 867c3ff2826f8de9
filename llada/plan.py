"""What a pretraining run needs before it is started: FLOPs, days, memory per GPU. Estimates, with their assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from llada.config import Recipe
from llada.errors import UserError

GPUS: dict[str, tuple[float, float]] = {  # dense bf16 FLOP/s, memory in GiB
    "a100": (312e12, 80),
    "h100": (989e12, 80),
    "h800": (989e12, 80),
    "h200": (989e12, 141),
    "b200": (2250e12, 180),
}
GIB = 1024**3


@dataclass(frozen=True)
class Plan:
    parameters: int
    non_embedding_parameters: int
    tokens: int
    flops: float
    days: float
    tokens_per_second_per_gpu: float
    state_gib: float  # weights, gradients, optimizer state of one GPU
    activation_gib: float  # of one micro-batch
    fits: bool
    gpus: int
    gpu: str
    mfu: float
    memory_gib: float


def plan(recipe: Recipe, *, gpus: int, gpu: str, mfu: float) -> Plan:
    """The cost of `recipe.pretrain` on `gpus` GPUs at an assumed utilisation.

    Memory: float32 master weights, gradients and two Adam moments (one with Muon), sharded evenly, the two largest
    gathered layers in bf16; activations as one tensor of (rows, length, d_model) per layer with activation
    checkpointing, about 34 bytes per element and layer without, and float32 logits of half the positions.
    """
    if gpu.lower() not in GPUS:
        raise UserError(f"gpu {gpu!r} is none of {', '.join(GPUS)}")
    peak, memory = GPUS[gpu.lower()]
    model, run = recipe.model, recipe.pretrain
    if run.train.num_steps is None:
        raise UserError("the recipe counts epochs: give --train.num-steps to plan it")
    length = recipe.prepare.row_length
    tokens = run.train.num_steps * run.train.global_batch_tokens
    flops = model.training_flops_per_token(length) * tokens
    rate = gpus * peak * mfu
    moments = 1 if run.optim.optimizer == "muon" else 2
    layer = (model.num_non_embedding_parameters - model.d_model) / model.num_layers
    gathered = 2 * (2 * layer + model.vocab_size * model.d_model * (2 - model.tie_embeddings))
    state = model.num_parameters * 4 * (2 + moments) / gpus + (gathered if gpus > 1 else 0)
    rows = run.train.micro_batch_rows
    per_layer = 2 if run.train.activation_checkpointing else 34
    activations = rows * length * model.d_model * (model.num_layers * per_layer + 34)
    logits = rows * length / 2 * model.vocab_size * (2 + 4)
    return Plan(
        parameters=model.num_parameters,
        non_embedding_parameters=model.num_non_embedding_parameters,
        tokens=tokens,
        flops=flops,
        days=flops / rate / 86_400,
        tokens_per_second_per_gpu=rate / gpus / model.training_flops_per_token(length),
        state_gib=state / GIB,
        activation_gib=(activations + logits) / GIB,
        fits=(state + activations + logits) / GIB < 0.92 * memory,
        gpus=gpus,
        gpu=gpu.lower(),
        mfu=mfu,
        memory_gib=memory,
    )


def format_plan(p: Plan) -> str:
    """The plan as a few lines of text."""
    need = p.state_gib + p.activation_gib
    return "\n".join(
        [
            f"parameters            {p.parameters:,} ({p.non_embedding_parameters:,} without embeddings)",
            f"tokens                {p.tokens:,}",
            f"training FLOPs        {p.flops:.3g}",
            f"time on {p.gpus} × {p.gpu:<10} {p.days:,.1f} days at {p.mfu:.0%} MFU "
            f"({p.tokens_per_second_per_gpu:,.0f} tokens/s per GPU, {p.days * 24 * p.gpus:,.0f} GPU-hours)",
            f"memory per GPU        {need:.1f} of {p.memory_gib:.0f} GiB "
            f"({p.state_gib:.1f} state, {p.activation_gib:.1f} activations)"
            + ("" if p.fits else " — does not fit: use more GPUs or a smaller train.micro_batch_rows"),
        ]
    )
