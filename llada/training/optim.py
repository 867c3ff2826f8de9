"""Optimizers and the learning-rate schedule.

Muon (torch.optim.Muon) moves the matrices inside the blocks, AdamW everything else (embedding, head, norms); without
Muon, AdamW moves all. The schedule is warm-up–stable–decay, with drops in between as LLaDA made one at 1.2 T tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Private, because public Muon scales its rate only inside its own step; torch's own factor keeps us equal to it.
from torch.optim._muon import _adjust_lr

from llada.model.initial import is_sharded
from llada.settings import check_limits, limited, require
from llada.training.adamw import Bf16AdamW, assign_unless, local_shard
from llada.training.parallel import resolve_precision

OptimizerName = Literal["adamw", "muon"]
Decay = Literal["linear", "cosine"]
Moments = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class OptimConfig:
    """`lr` is AdamW's peak; with optimizer="muon" the blocks' matrices move by `muon_lr` instead.

    Muon's updates are scaled to AdamW's RMS (match_rms_adamw), so the two rates are of one size.
    """

    optimizer: OptimizerName = "adamw"
    """"muon" moves the matrices inside the blocks with Muon and everything else with AdamW."""
    lr: float = limited(3e-4, above=0)
    """AdamW's peak rate."""
    muon_lr: float = limited(3e-4, above=0)
    """Muon's peak rate."""
    muon_momentum: float = limited(0.95, low=0, below=1)
    betas: tuple[float, float] = limited((0.9, 0.95), low=0, below=1)
    """Of AdamW's two moments."""
    eps: float = limited(1e-8, above=0)
    """Of AdamW's denominator."""
    moments: Moments = "fp32"
    """Precision in which AdamW keeps its two moments; "bf16" saves four bytes a parameter, with a second beta of at most 0.99."""
    weight_decay: float = limited(0.1, low=0)
    """Of matrices and embeddings; norms are never decayed."""
    grad_clip: float = limited(1.0, low=0)
    """Global norm of the gradient; 0 is off."""
    warmup_steps: int = limited(100, low=0)
    """Steps of the linear rise from 0 to the peak."""
    decay: Decay = "linear"
    """How the rate falls from the plateau to its end: in a line (LLaDA), or as half a cosine (iLLaDA)."""
    decay_fraction: float = limited(0.2, low=0, high=1)
    """Last share of the run, down to final_lr_ratio. A run on its plateau can be told to decay when it goes on (--resume)."""
    final_lr_ratio: float = limited(0.1, low=0)
    """Of the peak, at the end."""
    drops: tuple[tuple[float, float], ...] = limited((), low=0)
    """Pairs (share of the run, factor of the peak from there on), in the order of the run."""

    def __post_init__(self) -> None:
        check_limits(self, "optim")
        require(
            self.moments == "fp32" or self.betas[1] <= 0.99,
            f"optim: moments=bf16 cannot take up the small steps of betas[1] {self.betas[1]}: keep them in fp32, or set it to "
            "0.99 or less",
        )
        shares = [share for share, _ in self.drops]
        require(
            all(a < b for a, b in itertools.pairwise([*shares, 1.0])),
            f"optim: drops must stand at rising shares of the run below 1, not at {', '.join(map(str, shares))}",
        )


def schedule_faults(num_steps: int, config: OptimConfig) -> list[str]:
    """What a schedule of this many steps cannot do as it is set, a line each; empty for a sound one."""
    first_decay = num_steps - round(config.decay_fraction * num_steps)
    faults = []
    if config.warmup_steps > num_steps:
        faults.append(
            f"optim.warmup_steps {config.warmup_steps} is more than the run's {num_steps} steps: "
            f"the learning rate ends at {lr_factor(num_steps - 1, num_steps, config):.0%} of its peak"
        )
    elif config.warmup_steps > first_decay:
        faults.append(
            f"optim.warmup_steps {config.warmup_steps} reaches into the decay that optim.decay_fraction "
            f"{config.decay_fraction:g} begins at step {first_decay} of {num_steps}: the decay begins late, with a jump"
        )
    for share, _ in config.drops:
        if not config.warmup_steps <= share * num_steps <= first_decay:
            faults.append(
                f"optim.drops: the drop at {share:g} of the run falls into its "
                f"{'warm-up' if share * num_steps < config.warmup_steps else 'decay'}"
            )
    return faults


def lr_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """Factor of the peak rate at this 0-based step: linear warm-up, hold (with drops), linear or cosine decay."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    plateau = 1.0
    for share, factor in config.drops:
        if step >= share * num_steps:
            plateau = factor
    decay_steps = round(config.decay_fraction * num_steps)
    into_decay = step - (num_steps - decay_steps)
    if into_decay < 0 or decay_steps == 0:
        return plateau
    share = (into_decay + 1) / decay_steps
    if config.decay == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return plateau + (config.final_lr_ratio - plateau) * share


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon that orthogonalises whole matrices although FSDP shards them by rows.

    torch's own step runs Newton–Schulz on DTensors: every product is a collective, and bfloat16 partial sums make the
    result depend on the number of workers. Here an all-to-all hands each worker whole matrices (one of every W), it
    orthogonalises those, and a second all-to-all brings the rows home: the same numbers as on one worker, and each
    matrix is computed once. Momentum stays sharded, so checkpoints reshard like any other state.
    """

    found_inf: Tensor | None = None
    """() float32: 1 where this step must move nothing (see `step_all`)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, params, grads, momenta)
            updates = []
            for grad, momentum in zip(map(local_shard, grads), map(local_shard, momenta), strict=True):
                assign_unless(self.found_inf, momentum, momentum.lerp(grad, 1 - group["momentum"]))
                updates.append(
                    grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum.clone()
                )

            def orthogonalise(matrix: Tensor, group: dict = group) -> Tensor:
                return newton_schulz(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])

            if is_sharded(params[0]):
                mesh = params[0].device_mesh
                shards = mesh.get_group(mesh.ndim - 1)  # HSDP's copies each do the same
                updates = map_whole_matrices(updates, [p.shape for p in params], orthogonalise, shards)
            else:
                updates = [orthogonalise(update) for update in updates]
            for param, update in zip(params, updates, strict=True):
                rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], param.shape)
                shrunk = local_shard(param) * (1 - group["lr"] * group["weight_decay"])
                assign_unless(self.found_inf, local_shard(param), shrunk.add_(update, alpha=-rate))


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: Muon's quintic iteration, float32 in and out.

    In bfloat16 like torch.optim.Muon where the hardware has it; in float32 elsewhere, which is three times faster
    there than emulated bfloat16.
    """
    dtype = resolve_precision("auto", matrix.device)
    x = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).to(dtype)
    x = x / x.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def map_whole_matrices(shards: list[Tensor], shapes: list[torch.Size], function, group) -> list[Tensor]:
    """Apply `function` to whole matrices given by row shards, each matrix on one worker; the row shards of the results.

    Args:
        shards: this worker's rows of every matrix (FSDP's split: ceil(rows / W) each, the last may have fewer or none).
        shapes: the whole shapes, in the same order on every worker.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    results: list[Tensor] = []
    for first in range(0, len(shards), world):
        batch = range(first, min(first + world, len(shards)))
        rows = [[_rows_of(shapes[i][0], r, world) for r in range(world)] for i in batch]
        widths = [shapes[i][1] for i in batch]
        # To worker j goes my part of matrix j; from worker r comes its part of matrix `rank`.
        send_sizes = [rows[j][rank] * widths[j] if j < len(batch) else 0 for j in range(world)]
        mine = rank < len(batch)
        receive_sizes = [rows[rank][r] * widths[rank] if mine else 0 for r in range(world)]
        sent = torch.cat([shards[i].reshape(-1) for i in batch])
        received = sent.new_empty(sum(receive_sizes))
        dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=group)
        if mine:
            received = function(received.view(shapes[first + rank])).to(sent.dtype).reshape(-1).contiguous()
        returned = torch.empty_like(sent)
        dist.all_to_all_single(returned, received, send_sizes, receive_sizes, group=group)
        pieces = returned.split(send_sizes[: len(batch)])
        results += [piece.view(rows[j][rank], widths[j]) for j, piece in enumerate(pieces)]
    return results


def _rows_of(total: int, rank: int, world: int) -> int:
    """Rows of a matrix that FSDP gives this worker (the sizes of torch.chunk)."""
    chunk = math.ceil(total / world)
    return max(0, min(chunk, total - rank * chunk))


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimizers over the network's (possibly sharded) parameters, each group with its peak rate as `peak_lr`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and name.startswith("layers.")]
    in_muon = {id(p) for p in matrices} if config.optimizer == "muon" else set()
    decayed = [p for _, p in named if p.ndim == 2 and id(p) not in in_muon]
    norms = [p for _, p in named if p.ndim != 2]
    adamw = functools.partial(torch.optim.AdamW, fused=True) if config.moments == "fp32" else Bf16AdamW
    optimizers: list[torch.optim.Optimizer] = []
    if decayed or norms:  # of adapters, Muon moves all
        optimizers.append(
            adamw(
                [
                    {"params": decayed, "weight_decay": config.weight_decay},
                    {"params": norms, "weight_decay": 0.0},
                ],
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
            )
        )
    if in_muon:
        optimizers.append(
            ShardedMuon(
                matrices,
                lr=config.muon_lr,
                momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def step_all(optimizers: list[torch.optim.Optimizer], skipped: Tensor) -> None:
    """One step of each, then their gradients are gone. Where `skipped` (() float32) is 1 and not 0, nothing moves, no moment
    and no count either; that is seen on the device, for which nobody waits."""
    for optimizer in optimizers:
        optimizer.found_inf = skipped  # type: ignore[attr-defined]  # as torch's GradScaler tells fused optimizers
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Put every group at this factor of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
