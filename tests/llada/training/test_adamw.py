"""AdamW with half the state: the same moves but for bfloat16's rounding."""

import pytest
import torch

from llada.errors import UserError
from llada.training.adamw import Bf16AdamW
from llada.training.optim import OptimConfig, build_optimizers

KNOBS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def both(steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 30, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = Bf16AdamW([ours], **KNOBS), torch.optim.AdamW([theirs], **KNOBS)
    for _ in range(steps):
        grad = torch.randn(start.shape, generator=generator) + 0.5
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return ours.detach() - start, theirs.detach() - start, optimizers[0]


def test_the_first_step_is_torchs() -> None:
    """Nothing of the moments has been rounded yet."""
    ours, theirs, _ = both(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_later_steps_are_torchs_but_for_rounding() -> None:
    ours, theirs, optimizer = both(60)
    assert (ours - theirs).norm() < 0.01 * theirs.norm()
    (state,) = optimizer.state.values()
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert state["step"] == 60


def test_moments_that_would_stand_still_are_refused() -> None:
    with pytest.raises(UserError, match=r"moments=bf16.*betas\[1\] 0.999"):
        OptimConfig(moments="bf16", betas=(0.9, 0.999))


def test_the_setting_chooses() -> None:
    model = torch.nn.Linear(3, 3)
    assert isinstance(build_optimizers(model, OptimConfig(moments="bf16"))[0], Bf16AdamW)
    assert not isinstance(build_optimizers(model, OptimConfig())[0], Bf16AdamW)
