"""Fine-tuning of a head with the network under it, by the optimizers and the schedule of `training`, and its answers.

Order and head are functions of the seed, and nothing else is drawn: a fine-tuning can be done again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llada.diffusion.noise import stream_key
from llada.errors import UserError
from llada.training.optim import OptimConfig, build_optimizers, lr_factor, set_lr, step_all
from llada.training.parallel import autocast, clip_gradients, resolve_precision
from llada.understanding.classifier import Classifier
from llada.understanding.config import UnderstandingConfig


def finetune(
    model: Classifier,
    rows: Sequence[Sequence[int]],
    labels: Sequence[float],
    config: UnderstandingConfig,
    seed: int,
) -> list[float]:
    """Move all weights of `model`, in float32, towards the labels (numbers of classes, or scores); the loss of each step.

    Raises UserError when the loss or its gradient is no finite number.
    """
    device = model.head.weight.device
    dtype = resolve_precision("auto", device)
    num_steps = max(1, round(config.num_epochs * len(rows) / config.batch_rows))
    warmup = round(config.warmup_fraction * num_steps)
    optim = OptimConfig(
        lr=config.lr,
        betas=(0.9, 0.999),
        weight_decay=config.weight_decay,
        warmup_steps=warmup,
        decay_fraction=1 - warmup / num_steps,
        final_lr_ratio=0.0,
    )
    # The head of the language model is not asked; without a gradient, an optimizer leaves it as it is.
    optimizers = build_optimizers(model, optim)
    order = _order(len(rows), num_steps * config.batch_rows, seed)
    losses = []
    model.train()
    for step in range(num_steps):
        set_lr(optimizers, lr_factor(step, num_steps, optim))
        some = order[step * config.batch_rows : (step + 1) * config.batch_rows]
        with autocast(device, dtype):
            outputs = model([rows[number] for number in some])
        loss = loss_of(outputs, torch.tensor([labels[number] for number in some], device=device), config)
        loss.backward()
        norm = clip_gradients(model, optim.grad_clip)
        if not bool(torch.isfinite(loss.detach() + norm)):
            raise UserError(
                f"the fine-tuning's loss ({float(loss.detach()):g}) or its gradient is no finite number at step {step}: set a lower "
                "--understanding.lr"
            )
        step_all(optimizers, skipped=torch.zeros((), device=device))
        losses.append(float(loss.detach()))
    return losses


def loss_of(outputs: Tensor, labels: Tensor, config: UnderstandingConfig) -> Tensor:
    """Cross-entropy of outputs (B, K) and classes (B,), or the squared distance of (B, 1) from scores (B,): means."""
    if config.target == "class":
        return F.cross_entropy(outputs, labels.long())
    return F.mse_loss(outputs[:, 0], labels.float())


def _order(num_rows: int, count: int, seed: int) -> list[int]:
    """`count` rows: each once in every epoch, in a new order."""
    generator = torch.Generator().manual_seed(stream_key(seed, "understanding order") % (1 << 63))
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(num_rows, generator=generator).tolist()
    return order[:count]


@torch.no_grad()
def answers(model: Classifier, rows: Sequence[Sequence[int]], config: UnderstandingConfig) -> list[float]:
    """The likeliest class of each row, or its score."""
    device = model.head.weight.device
    model.eval()
    found: list[float] = []
    for at in range(0, len(rows), config.batch_rows):
        with autocast(device, resolve_precision("auto", device)):
            outputs = model(rows[at : at + config.batch_rows])
        found += (outputs.argmax(1) if config.target == "class" else outputs[:, 0]).tolist()
    return found
