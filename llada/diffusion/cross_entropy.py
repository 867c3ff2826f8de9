"""−log p of tokens over the vocabulary, the widest thing in a training step: from logits, and from what the head is given.

Of N predicted positions the logits, their float32 copy, its softmax and its gradient would be (N, V) each: 8 GB apiece for
16k positions and 126k ids. `weighted_nats` has the head's product with it and keeps no more than a slice of them; its
gradient is computed on the way, while the slice is there.

Shape legend: N positions, n of a slice, D model width, V vocabulary rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from llada.model.predict import guide

# Logits that are worked on at a time. A GPU wants products of some thousand rows; a CPU, what its caches hold.
SLICE = {"cpu": 1 << 25, "cuda": 1 << 27}


# Or its loop over slices would be compiled anew for each number of positions. Private, because torch.compiler.disable imports
# the compiler at once: a second, for everybody who reads settings.
@_disable_dynamo
def weighted_nats(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    *,
    excluded_id: int | None = None,
    buckets: Tensor | None = None,
    tally: Tensor | None = None,
) -> Tensor:
    """Σ scale · −log softmax(x Wᵀ)[target]: a scalar in float32 (float64 stays).

    The product is computed in the dtype of the autocast around it, all else in float32, the gradient of W too until all
    slices are summed up.

    Args:
        x: (N, D) what the head is given.
        weight: (V, D) of the head.
        targets: (N,) int64.
        scale: (N,) what each position counts.
        excluded_id: gets probability zero (MDLM's SUBS, the mask).
        buckets: (N,) int64 in [0, K) of each position; K and more: none.
        tally: (K, 2) float64, to which the −log softmax of each bucket's positions and their number are added.
    """
    result: Tensor = _WeightedNats.apply(x, weight, targets, scale, excluded_id, buckets, tally)
    return result


class _WeightedNats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        excluded_id: int | None,
        buckets: Tensor | None,
        tally: Tensor | None,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.autocast(device, enabled=False):
            total, grad_x, grad_weight = _by_slices(
                x.to(dtype),
                weight.to(dtype),
                targets,
                scale.to(wide),
                excluded_id,
                ctx.needs_input_grad[:2],
                buckets,
                tally,
            )
        ctx.grads = [
            None if grad is None else grad.to(of.dtype) for grad, of in ((grad_x, x), (grad_weight, weight))
        ]
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since V · D numbers are many; therefore only once.
        if ctx.grads is None:
            raise RuntimeError("weighted_nats: the gradient is asked for a second time, and is not kept")
        grads, ctx.grads = ctx.grads, None
        return (*(None if own is None else own.mul_(grad) for own in grads), *(None,) * 5)


def _by_slices(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    excluded_id: int | None,
    needs_grad: tuple[bool, bool],
    buckets: Tensor | None,
    tally: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum in float64, and its gradients for x (N, D) and weight (V, D), where they are wanted."""
    wide = scale.dtype
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    grad_x = torch.empty_like(x) if needs_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad[1] else None
    size = max(1, SLICE["cuda" if x.is_cuda else "cpu"] // len(weight))
    for begin in range(0, len(x), size):
        part = slice(begin, begin + size)
        given, target, counts = x[part], targets[part, None], scale[part, None]
        logits = F.linear(given, weight).to(wide)
        if excluded_id is not None:
            logits[:, excluded_id] = -torch.inf
        logits -= logits.amax(1, keepdim=True)
        own = logits.gather(1, target)
        odds = logits.exp_()
        sums = odds.sum(1, keepdim=True)
        nats = sums.log() - own
        total += (nats * counts).sum(dtype=torch.float64)
        if buckets is not None and tally is not None:
            # A product, not a scattered addition, whose order a GPU does not keep.
            is_in = buckets[part, None] == torch.arange(len(tally), device=tally.device)
            tally += is_in.T.double() @ torch.cat([nats, torch.ones_like(nats)], 1).double()
        if grad_x is None and grad_weight is None:
            continue
        # ∂/∂logits = scale · (softmax − one-hot), in the memory of the logits.
        error = odds.mul_(counts / sums).scatter_add_(1, target, -counts).to(weight.dtype)
        if grad_x is not None:
            torch.mm(error, weight, out=grad_x[part])
        if grad_weight is not None and weight.dtype == wide:
            grad_weight.addmm_(error.T, given)
        elif grad_weight is not None:
            grad_weight += error.T @ given
    return total, grad_x, grad_weight


def token_cross_entropy(
    x: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    excluded_id: int | None = None,
    cfg_scale: float = 0.0,
) -> Tensor:
    """−log p of the targets (N,) in float32 (float64 stays), from logits of any precision, or from what the head is given.

    Args:
        x: (N, V) logits; with `weight` the head's (N, D), of which no more than a slice of logits is there at a time (unless
            autograd keeps them: `weighted_nats` is for training).
        weight: (V, D) of the head.
        excluded_id: gets probability zero.
        cfg_scale: with one, x is (2N, …), the unconditional half behind the other, and p is guided (`predict.guide`).
    """
    if weight is not None and torch.is_autocast_enabled(x.device.type):  # once, not slice by slice
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    N, V = len(targets), x.shape[1] if weight is None else len(weight)
    size = max(1, SLICE["cuda" if x.is_cuda else "cpu"] // V)
    pieces = []
    for begin in range(0, max(N, 1), size):
        target = targets[begin : begin + size]
        given = x[begin : begin + len(target)]
        if cfg_scale:
            given = torch.cat([given, x[N + begin : N + begin + len(target)]])
        logits = given if weight is None else F.linear(given, weight)
        if cfg_scale:
            logits = guide(logits, cfg_scale)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        if excluded_id is not None:
            fill = Tensor.index_fill if weight is None else Tensor.index_fill_  # the caller's logits stay
            wide = fill(wide, 1, torch.tensor([excluded_id], device=wide.device), -torch.inf)
        pieces.append(F.cross_entropy(wide, target, reduction="none"))
    return torch.cat(pieces)
