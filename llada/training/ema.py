"""The exponential moving average of the weights: less noisy than the weights of any one step (MDLM, MD4: decay 0.9999)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from llada.training.adamw import local_shard
from llada.training.parallel import reshard

AVERAGE_SLOTS = ("average", "average_updates")
"""Its state of each parameter, as a checkpoint names it: the average, and of how many steps."""


class WeightAverage(torch.optim.Optimizer):
    """average ← d · average + (1 − d) · weight after each step, in float32 and of each worker's own shard.

    To the loop it is the last of the optimizers: it steps behind those that move the weights, not when they are skipped, and
    its state stands in checkpoints beside theirs. d is `decay`, in the n-th step at most (1 + n) / (10 + n), so that the
    average forgets its beginning (MDLM's ema.py). It begins with the weights of the first step.
    """

    slot_dtype = torch.float32
    found_inf: Tensor | None = None
    """() float32: 1 where this step must move nothing (see `step_all`)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        # It has no learning rate; `set_lr` scales 0.
        super().__init__([p for p in model.parameters() if p.requires_grad], {"peak_lr": 0.0})
        self.model, self.decay = model, decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take the weights as they are into the average."""
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["average"] = parameter.detach().float().clone()
                state["average_updates"] = torch.zeros((), device=parameter.device)
            n = state["average_updates"]
            n += 1 if self.found_inf is None else 1 - self.found_inf
            share = 1 - ((1 + n) / (10 + n)).clamp(max=self.decay)
            if self.found_inf is not None:
                share = share * (1 - self.found_inf)
            local_shard(state["average"]).lerp_(local_shard(parameter).float(), share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their averages, in place; one tensor at a time is in memory twice."""
        for parameter, state in self.state.items():
            weight, average = local_shard(parameter), local_shard(state["average"])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        reshard(self.model)  # gathered weights would be those of before


@contextlib.contextmanager
def averaged_weights(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Within it the network has the averages for weights, where one of the optimizers keeps them."""
    average = next((each for each in optimizers if isinstance(each, WeightAverage)), None)
    if average is None:
        yield
        return
    average.swap()
    try:
        yield
    finally:
        average.swap()
