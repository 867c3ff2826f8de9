"""The command `plan`: what a preset's pretraining costs, before it is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llada.plan import estimate_cost, format_cost
from llada.settings import check_limits, limited
from pipelines.stage.command import parse, run_command, take_recipe


@dataclass(frozen=True)
class PlanArgs:
    """What a pretraining run costs before it is started."""

    gpus: int = limited(8, low=1)
    gpu: str = "h100"
    """One of llada/hardware.py, such as h100 or a100; an unknown one is answered with the nearest."""
    mfu: float = limited(0.35, above=0, high=1)
    """Assumed model FLOPs utilisation."""

    def __post_init__(self) -> None:
        check_limits(self, "plan")


def main(argv: Sequence[str]) -> None:
    """`llada plan <preset> …`"""
    recipe, words = take_recipe(argv, "plan")
    args = parse(PlanArgs, words, "plan <preset>")
    print(format_cost(estimate_cost(recipe, gpus=args.gpus, gpu=args.gpu, mfu=args.mfu)))


if __name__ == "__main__":
    run_command("plan")
