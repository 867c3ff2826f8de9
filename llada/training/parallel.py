"""Parallelism and precision, applied to the network from outside.

FSDP2 (`fully_shard`) whenever there are several workers, over all of them or (HSDP) over groups of them; autocast otherwise.
The network does not know, and where one works alone, nothing of it is imported. At any number of workers the residual
stream, the embedding's rows and the products are of the compute dtype, while norms and rotary positions are computed, and
gradients reduced, in float32.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llada.errors import UserError
from llada.model.compilation import for_many_kinds
from llada.model.initial import is_sharded
from llada.model.lora import LoraConfig, add_adapters
from llada.model.transformer import ModelConfig, Transformer

Precision = Literal["auto", "fp32", "bf16"]
Recomputed = Literal["none", "selective", "full"]
"""What of a block is computed again in the backward pass."""

log = logging.getLogger(__name__)


def world() -> tuple[int, int]:
    """(rank, number of workers); (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def copy_size(num_workers: int, shard_workers: int | None) -> int:
    """How many of the workers share one copy of weights and optimizer state: `shard_workers`, or all where that is None, or no
    divisor of their number. (A group that has lost a machine may be of any size, and must go on.)"""
    return num_workers if shard_workers is None or num_workers % shard_workers else shard_workers


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
    recomputed: Recomputed = "none",
    compiled: bool = False,
    float8: bool = False,
    shard_workers: int | None = None,
    lora: LoraConfig | None = None,
) -> Transformer:
    """An uninitialised network on `device`, sharded over all workers: `restore` (checkpoint/restore.py) fills it.

    Parameters are float32 masters; each group (the embedding, each block, the norm with the head) gathers them in `dtype` for
    its forward and backward.

    Args:
        recomputed: "selective" keeps of a block what the attention and every other product give.
        compiled: each block by itself, so that one compilation serves all.
        float8: the blocks' products through torchao, with one scale for each tensor; emulated where the device has none.
        shard_workers: see `copy_size`.
        lora: with a rank, everything but the adapters is frozen, its matrices kept in `dtype`.
    """
    rank, num_workers = world()
    sharing = copy_size(num_workers, shard_workers)
    if rank == 0 and shard_workers not in (None, sharing):
        log.warning(
            "train.shard_workers %s does not divide the %d workers: all share", shard_workers, num_workers
        )
    with torch.device("meta"):
        model = Transformer(config)
    if lora is not None and lora.rank is not None:
        add_adapters(model, lora, dtype)
    for layer in model.layers:
        if float8:
            _use_float8(layer, device)
        if recomputed != "none":
            layer.forward = _recomputing(layer.forward, recomputed)
        if compiled:
            layer.compile(fullgraph=True, **for_many_kinds())
    if num_workers > 1:
        _shard(model, device, dtype, num_workers, sharing)
    if dtype != torch.float32:  # where the residual stream begins
        model.embed.register_forward_hook(lambda module, args, rows: rows.to(dtype))
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    return model


def _use_float8(layer: nn.Module, device: torch.device) -> None:
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(f"train.float8 needs torchao ({error}): pip install torchao") from error
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and (module.in_features % 16 or module.out_features % 16):
            raise UserError(
                f"train.float8: {name} is {module.out_features} × {module.in_features}, and float8 products need multiples of "
                "16: leave it out, or choose such widths"
            )
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    convert_to_float8_training(layer, config=Float8LinearConfig(emulate=not native))


def _shard(
    model: Transformer, device: torch.device, dtype: torch.dtype, num_workers: int, shard_workers: int
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if shard_workers == num_workers:
        mesh = init_device_mesh(device.type, (num_workers,))
    else:
        sizes = (num_workers // shard_workers, shard_workers)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # would round the rotary tables
    )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if not model.config.tie_embeddings:  # else one group, the root's, holds their common matrix
        fully_shard(model.embed, mesh=mesh, mp_policy=policy)
        fully_shard([model.norm, model.lm_head], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _recomputing(forward: Callable[..., Tensor], recomputed: Recomputed) -> Callable[..., Tensor]:
    """Computes a block again in the backward pass instead of keeping (all of) its activations."""
    options: dict[str, Any] = {}
    if recomputed == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(_EveryOther())

    def recompute(*args: Any) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False, **options)

    return recompute


_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


class _EveryOther:
    """What selective recomputation keeps of one run of a block: the attention and every other product, about half of what
    is dear to compute, in a third of the memory (torchtitan's choice)."""

    def __init__(self) -> None:
        self.products = {False: 0, True: 0}

    def __call__(self, context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        if op in _PRODUCTS:
            self.products[context.is_recompute] += 1
        kept = op in _ATTENTION or (op in _PRODUCTS and self.products[context.is_recompute] % 2)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def begin_micro_batch(model: nn.Module, *, is_last: bool) -> None:
    """Say whether this is the step's last one. Each gives its gradients to those who keep them, so that nobody holds them
    whole; between the copies of HSDP they are added at the end only. The embedding and the head stay whole until then."""
    if world()[1] == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(model, FSDPModule)
    model.set_is_last_backward(is_last)
    model.set_requires_all_reduce(is_last)
    for module in (model, model.embed, model.norm):
        if isinstance(module, FSDPModule):
            module.set_reshard_after_backward(is_last, recurse=False)


def reshard(model: nn.Module) -> None:
    """After a forward without a backward: give the gathered weights back, or `named_parameters` yields those.

    FSDP keeps the head's gathered for the backward pass that usually follows.
    """
    if world()[1] == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def evaluating(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """For forwards without a backward pass, between two steps of training."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dtype):
            yield
    finally:
        reshard(model)
        model.train(was_training)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clip to a global norm (0: measure only) and return the norm before clipping, a plain scalar tensor."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm > 0 else float("inf"))
    return norm.full_tensor() if is_sharded(norm) else norm


def full_tensor(shard: Tensor, *, wanted: bool = True) -> Tensor:
    """The whole of a tensor, on the CPU; an empty one where it is not wanted. A collective for a sharded one."""
    full = shard.full_tensor() if is_sharded(shard) else shard
    return full.cpu() if wanted else full.new_empty(0)


def full_state(model: Transformer) -> dict[str, Tensor]:
    """Our names of the trained parameters -> copies of the whole tensors, on the CPU of every worker: for small networks, and
    for adapters. A collective."""
    return {
        name: full_tensor(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


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
