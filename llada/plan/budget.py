"""From a budget of compute, and of text, to a model: Quokka's scaling law of masked diffusion (arXiv 2510.03280).

    parameters   N = 0.0216 · C^0.514        tokens   D = 7.7 · C^0.486        (C = 6 N D FLOPs)
    bound        L = 2.413 + 798.6 / N^0.379 + 4604.9 / D^0.378 nats per token (GPT-NeoX's vocabulary of 50,289)
    epochs       that U unique tokens can be repeated before the bound rises: e = 7154 · U^0.39 / N^0.55
    little text  however much compute there is: N = 41 M · (U / 10 M)^0.367, for so many epochs

The factors of the last two are those of the paper's examples: 400 M parameters have 70, 175, 430 and 1057 epochs on 10 M to 10 B
tokens, for which 41, 95, 222 and 518 M parameters are best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llada.errors import UserError

FITTED_FLOPS = (1e19, 1e21)
"""Below, the law's bounds are far from its runs; above, it is taken as an extrapolation. LLaDA-8B had 1.1e23, of which the paper
says what the law says there."""
FITTED_UNIQUE = (1e7, 1e12)
"""Tokens: from the smallest of the paper's examples of repetition to the largest."""
ABLATED_RATE = 1e-4
"""The best learning rate of the paper's ablation (1 B parameters, 96 B tokens). Its runs have 2e-4, decayed to 2e-5."""
ABLATED_BATCH = (256 * 2048, 1024 * 2048)
"""Tokens: batches that came out alike there; four times as many came out worse."""


@dataclass(frozen=True)
class BudgetPlan:
    """What to train with a budget."""

    flops: float
    is_extrapolated: bool
    parameters: float
    tokens: float
    """Trained on, all epochs."""
    epochs: float
    most_epochs: float | None
    """Before the bound rises; None where the unique tokens were not told."""
    limited_by: Literal["compute", "text"]
    """By text: the budget would repeat it too often; the rest of the budget is of no use."""
    used_flops: float
    loss: float | None
    """Expected bound, nats per token of the paper's vocabulary; None where text is repeated, for which it does not hold."""
    batch_tokens: float
    learning_rate: tuple[float, float]
    """(the paper's ablation, the autoregressive law of which it says that it carries over)."""


def plan_budget(flops: float, unique_tokens: float | None = None, *, extrapolate: bool = False) -> BudgetPlan:
    """What the law makes of so many FLOPs, and of so much text (None: as much as one pass needs).

    Raises UserError outside the range in which the law was fitted, unless told to extrapolate.
    """
    is_outside = not FITTED_FLOPS[0] <= flops <= FITTED_FLOPS[1]
    if is_outside and not extrapolate:
        raise UserError(
            f"a budget of {flops:.3g} FLOPs is outside {FITTED_FLOPS[0]:g} to {FITTED_FLOPS[1]:g}, in which the law "
            "(arXiv 2510.03280) was fitted; --extrapolate uses it all the same"
        )
    parameters, tokens = 0.0216 * flops**0.514, 7.7 * flops**0.486
    epochs, most = 1.0, None
    limited_by: Literal["compute", "text"] = "compute"
    if unique_tokens is not None:
        epochs = tokens / unique_tokens
        is_far = not FITTED_UNIQUE[0] <= unique_tokens <= FITTED_UNIQUE[1]
        if epochs > 1 and is_far and not extrapolate:
            raise UserError(
                f"{unique_tokens:.3g} unique tokens are outside {FITTED_UNIQUE[0]:g} to {FITTED_UNIQUE[1]:g}, for which the "
                "law (arXiv 2510.03280) says how often text can be repeated; --extrapolate uses it all the same"
            )
        is_outside = is_outside or (epochs > 1 and is_far)
        most = most_epochs(parameters, unique_tokens)
        if epochs > most:
            limited_by = "text"
            parameters = 41e6 * (unique_tokens / 1e7) ** 0.367
            epochs = most = most_epochs(parameters, unique_tokens)
            tokens = epochs * unique_tokens
    used = min(flops, 6 * parameters * tokens)
    return BudgetPlan(
        flops=flops,
        is_extrapolated=is_outside,
        parameters=parameters,
        tokens=tokens,
        epochs=epochs,
        most_epochs=most,
        limited_by=limited_by,
        used_flops=used,
        loss=expected_loss(parameters, tokens) if epochs <= 1 else None,
        batch_tokens=batch_size(used),
        learning_rate=(ABLATED_RATE, learning_rate(used)),
    )


def expected_loss(parameters: float, tokens: float) -> float:
    """Nats per token, of tokens that are seen once."""
    return 2.413 + 798.6 / parameters**0.379 + 4604.9 / tokens**0.378


def most_epochs(parameters: float, unique_tokens: float) -> float:
    """So often text can be repeated before the bound rises."""
    return 7154 * unique_tokens**0.39 / parameters**0.55


def batch_size(flops: float) -> float:
    """Tokens: DeepSeek LLM's law (arXiv 2401.02954, equation 1); Quokka (§5.4) finds that such laws carry over."""
    return 0.2920 * flops**0.3271


def learning_rate(flops: float) -> float:
    """Of the same equation."""
    return 0.3118 * flops**-0.1250
