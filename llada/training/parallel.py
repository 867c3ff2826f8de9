"""Parallelism and precision, applied to the network from outside.

FSDP2 (`fully_shard`) over one mesh dimension whenever a process group exists; autocast otherwise. The network does not
know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from llada.model.transformer import ModelConfig, Transformer

Precision = Literal["auto", "fp32", "bf16"]


def world() -> tuple[int, int]:
    """(rank, number of workers); (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def training_device() -> torch.device:
    """This worker's device: its current CUDA device, or the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, float32 elsewhere: emulated bf16 is slower than float32."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        # Private, because torch has no public question for what a CPU multiplies natively.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision for the forward pass; nothing in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def build_parallel(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    activation_checkpointing: bool = False,
) -> Transformer:
    """An uninitialised network on `device`, sharded over all workers: `restore` (checkpoint/restore.py) fills it.

    Parameters are float32 masters; each block gathers them in `dtype` for its forward and backward, and gradients are
    reduced in float32.
    """
    with torch.device("meta"):
        model = Transformer(config)
    if activation_checkpointing:
        for layer in model.layers:
            layer.forward = _checkpointed(layer.forward)
    _, num_workers = world()
    if num_workers > 1:
        mesh = init_device_mesh(device.type, (num_workers,))
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # would round the rotary tables
        )
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    return model


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Recompute a block in the backward pass instead of keeping its activations."""

    def recomputing(*args: Any) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False)

    return recomputing


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """While accumulating, gradients need reducing only at the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def reshard(model: nn.Module) -> None:
    """After a forward without a backward: give the gathered weights back, or `named_parameters` yields those.

    FSDP keeps the root's weights (embedding, norm, head) gathered for the backward pass that usually follows.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clip to a global norm (0: measure only) and return the norm before clipping, a plain scalar tensor."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm > 0 else float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def full_state(model: Transformer) -> dict[str, Tensor] | None:
    """Our parameter names -> full CPU tensors on worker 0, None elsewhere. One tensor is gathered at a time."""
    rank, _ = world()
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank == 0:
            state[name] = full.cpu().clone()
    return state if rank == 0 else None


def all_sum(values: Tensor) -> Tensor:
    """Sum over the workers."""
    if world()[1] > 1:
        dist.all_reduce(values)
    return values


def from_all(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Each worker's `value`, any object, in their order. A collective of the group (None: of all workers)."""
    num_workers = world()[1]
    if num_workers == 1:
        return [value]
    values: list[Any] = [None] * num_workers
    dist.all_gather_object(values, value, group=group)
    return values


def wait_for_all() -> None:
    """A barrier."""
    if world()[1] > 1:
        dist.barrier()
