"""The command `plan`: what a preset's pretraining costs, before it is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llada.plan import estimate_cost, format_cost
from pipelines.stage.command import parse, run_command, take_recipe


@dataclass(frozen=True)
class PlanArgs:
    """What a pretraining run costs before it is started."""

    gpus: int = 8
    gpu: str = "h100"
    """h100, h200, h800, a100, b200."""
    mfu: float = 0.35
    """Assumed model FLOPs utilisation."""


def main(argv: Sequence[str]) -> None:
    """`llada plan <preset> …`"""
    recipe, words = take_recipe(argv, "plan")
    args = parse(PlanArgs, words, "plan <preset>")
    print(format_cost(estimate_cost(recipe, gpus=args.gpus, gpu=args.gpu, mfu=args.mfu)))


if __name__ == "__main__":
    run_command("plan")
