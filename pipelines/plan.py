"""The command `plan`: what a run costs before it is started, or what to train with a budget.

    llada plan llada_8b --gpus 256 --gpu h100        days, dollars, memory, checkpoints, failures, data, our own limits
    llada plan budget --gpu-hours 10000 --gpu h100   parameters, tokens, epochs, batch and rate by Quokka's law

The arithmetic is in llada/plan/; this file asks for it and shows it: a table, `--json`, a picture.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llada.config import Recipe
from llada.data.report.cost import Cluster
from llada.errors import UserError
from llada.files import write_bytes
from llada.hardware import ACCELERATORS
from llada.plan.budget import plan_budget
from llada.plan.checkpoints import CheckpointPlan, plan_checkpoints
from llada.plan.corpus import CorpusPlan, plan_corpus, with_work
from llada.plan.failures import MTBF_GPU_HOURS, Failures
from llada.plan.limits import Demand, Drivers, prepare_demands, train_demands
from llada.plan.prices import Dollars, PriceList, load_prices
from llada.plan.published import PUBLISHED
from llada.plan.serving import ServingPlan, plan_serving
from llada.plan.table import (
    Rows,
    bill_rows,
    budget_rows,
    checkpoint_rows,
    corpus_rows,
    failure_rows,
    format_table,
    limit_rows,
    published_rows,
    serving_rows,
    training_rows,
)
from llada.plan.training import TrainingCost, estimate_training
from llada.settings import check_limits, limited, require
from pipelines.runners.tasks import MAX_BLOCKS
from pipelines.stage.command import parse, run_command, take_recipe
from pipelines.stage.metrics import METRICS_EVERY_S, PART_LINES
from pipelines.stage.tracking import BUFFERED_CALLS

# Ray Train's controller looks at all workers so often (ray/train/v2/_internal/constants.py, 2.60).
CONTROLLER_POLL_S = 2.0
DRIVERS = Drivers(MAX_BLOCKS, METRICS_EVERY_S, PART_LINES, BUFFERED_CALLS, CONTROLLER_POLL_S)


@dataclass(frozen=True)
class PlanArgs:
    """What a run costs before it is started. (`llada plan budget --help`: what to train with a budget.)"""

    gpus: int = limited(8, low=1)
    gpu: str = "h100"
    """One of llada/hardware.py, such as h100 or a100; an unknown one is answered with the nearest."""
    gpus_per_node: int = limited(8, low=1)
    mfu: float = limited(0.35, above=0, high=1)
    """Assumed model FLOPs utilisation; ranges are those of published runs."""
    tokens: float | None = limited(None, above=0)
    """Different tokens to prepare; without it, as many as are trained on."""
    cpu_nodes: int = limited(16, low=1)
    """That prepare them."""
    cpu_cores: int = limited(64, low=1)
    """Of each."""
    mtbf_gpu_hours: float = limited(MTBF_GPU_HOURS, above=0)
    """Hours of one GPU between two failures: of a cluster of n GPUs, so many hours divided by n."""
    restart_s: float = limited(600.0, low=0)
    """From a failure until the workers read the last checkpoint: an assumption."""
    requests_per_second: float | None = limited(None, above=0)
    """Plan replicas for them, with the preset's sampling."""
    prompt_tokens: int = limited(256, low=0)
    """Of a request."""
    tokens_per_forward: float | None = limited(None, low=1)
    """That a parallel rule (threshold, ...) commits; without it, as many as the preset's steps make it."""
    prices: str | None = None
    """Price list, YAML or JSON (llada/plan/prices.py shows one); without it the default, whose date is told."""
    json: bool = False
    """Print JSON instead of the table."""
    png: str | None = None
    """Draw days and dollars by GPUs, and goodput by interval, into this file."""

    def __post_init__(self) -> None:
        check_limits(self, "plan")


@dataclass(frozen=True)
class BudgetArgs:
    """What to train with a budget: FLOPs, GPU-hours or dollars."""

    flops: float | None = limited(None, above=0)
    gpu_hours: float | None = limited(None, above=0)
    dollars: float | None = limited(None, above=0)
    """At the list's highest price."""
    unique_tokens: float | None = limited(None, above=0)
    """How much text there is; without it, as much as one pass needs."""
    gpu: str = "h100"
    """One of llada/hardware.py."""
    mfu: float = limited(0.35, above=0, high=1)
    """Assumed model FLOPs utilisation."""
    extrapolate: bool = False
    """Use the law outside the range in which it was fitted."""
    prices: str | None = None
    """Price list, YAML or JSON; without it the default."""
    json: bool = False
    """Print JSON instead of the table."""

    def __post_init__(self) -> None:
        check_limits(self, "plan budget")


def main(argv: Sequence[str]) -> None:
    """`llada plan <preset> …`, `llada plan budget …`"""
    if argv and argv[0] == "budget":
        print(budget(parse(BudgetArgs, argv[1:], "plan budget")))
        return
    recipe, words = take_recipe(argv, "plan")
    args = parse(PlanArgs, words, "plan <preset>")
    plan = make_plan(recipe, args)
    if args.png is not None:
        write_bytes(args.png, draw(recipe, args, plan))
    print(json.dumps(plan.to_json(), indent=2) if args.json else plan.to_text())


@dataclass(frozen=True)
class Plan:
    """All answers for a preset on a cluster."""

    training: TrainingCost
    checkpoints: CheckpointPlan
    failures: Failures
    checkpoint_every: int
    """Steps, of the recipe."""
    num_steps: int
    step_s: float
    days: tuple[float, float]
    """With failures."""
    bill: Dollars | None
    corpus: CorpusPlan
    serving: ServingPlan | None
    serving_hour: Dollars | None
    demands: list[Demand]
    prices: PriceList

    @property
    def goodput(self) -> float:
        """With the recipe's interval."""
        return self.failures.goodput(self.checkpoint_every * self.step_s)

    def to_text(self) -> str:
        missing = f"no price of a {self.training.gpu} ({self.prices.label}): give a list with --prices"
        sections: dict[str, Rows] = {
            "Training": training_rows(self.training),
            "Checkpoints": checkpoint_rows(self.checkpoints),
            "Failures": failure_rows(
                self.failures,
                step_s=self.step_s,
                every=self.checkpoint_every,
                num_steps=self.num_steps,
            ),
            "Bill": bill_rows(self.days, self.bill, missing),
            "Data": corpus_rows(self.corpus, self.training),
        }
        if self.serving is not None:
            sections["Serving"] = serving_rows(self.serving, self.serving_hour, missing)
        sections["Our own machinery at this size"] = limit_rows(self.demands)
        sections["Published runs"] = published_rows(self.training.mfu)
        return format_table(sections)

    def to_json(self) -> dict[str, Any]:
        best = self.failures.best_interval
        return {
            **asdict(self),
            "goodput": self.goodput,
            "best_interval_s": best,
            "best_goodput": self.failures.goodput(best),
            "demands": [{**asdict(demand), "share": demand.share} for demand in self.demands],
            "published": [
                {"name": run.name, "source": run.source, "mfu": run.mfu, "error": run.error(self.training.mfu)}
                for run in PUBLISHED
            ],
        }  # fmt: skip


def make_plan(recipe: Recipe, args: PlanArgs) -> Plan:
    """Raises UserError for what cannot be planned."""
    prices = load_prices(args.prices)
    cost = estimate_training(recipe, gpus=args.gpus, gpu=args.gpu, mfu=args.mfu)
    train = recipe.pretrain.train
    num_steps = cost.tokens // train.global_batch_tokens
    checkpoints = plan_checkpoints(
        recipe, gpus=args.gpus, gpus_per_node=args.gpus_per_node, num_steps=num_steps
    )
    failures = Failures(
        mtbf=args.mtbf_gpu_hours / args.gpus * 3600,
        stall=checkpoints.stall,
        write=checkpoints.write[1],
        restart=args.restart_s + checkpoints.read[1],
    )
    step_s = cost.days * 86_400 / num_steps
    interval_s = train.checkpoint_every * step_s
    low, high = (days / failures.goodput(interval_s) for days in cost.days_range)
    tokens = float(args.tokens or cost.tokens)
    cluster = replace(Cluster(), nodes=args.cpu_nodes, cores=args.cpu_cores)
    serving = serving_hour = None
    if args.requests_per_second is not None:
        serving = plan_serving(
            recipe,
            gpu=args.gpu,
            requests_per_second=args.requests_per_second,
            prompt_tokens=args.prompt_tokens,
            tokens_per_forward=args.tokens_per_forward,
        )
        serving_hour = prices.gpu_hours(serving.replicas, cost.gpu)
    return Plan(
        training=cost,
        checkpoints=checkpoints,
        failures=failures,
        checkpoint_every=train.checkpoint_every,
        num_steps=num_steps,
        step_s=step_s,
        days=(low, high),
        bill=prices.gpu_hours((low * 24 * args.gpus, high * 24 * args.gpus), cost.gpu),
        corpus=plan_corpus(tokens, prices, with_work(cluster, DRIVERS.data_blocks)),
        serving=serving,
        serving_hour=serving_hour,
        demands=[
            *prepare_demands(tokens, cluster, DRIVERS),
            *train_demands(
                recipe,
                cost,
                checkpoints,
                DRIVERS,
                unique_tokens=tokens,
                gpus_per_node=args.gpus_per_node,
                interval_s=interval_s,
            ),
        ],
        prices=prices,
    )


def budget(args: BudgetArgs) -> str:
    """The answer to `llada plan budget`. Raises UserError for what the law or the prices do not know."""
    given = [name for name in ("flops", "gpu_hours", "dollars") if getattr(args, name) is not None]
    found = f", not {' and '.join(given)}" if given else ""
    require(len(given) == 1, f"give one of --flops, --gpu-hours and --dollars{found}")
    prices, gpu = load_prices(args.prices), args.gpu.lower()
    an_hour = 3600 * ACCELERATORS.find(gpu).bf16_flops * args.mfu
    if args.flops is not None:
        flops = args.flops
    elif args.gpu_hours is not None:
        flops = args.gpu_hours * an_hour
    elif gpu in prices.gpu_hour:
        assert args.dollars is not None
        flops = args.dollars / prices.gpu_hour[gpu][1] * an_hour
    else:
        raise UserError(f"the price list ({prices.label}) has no price of a {gpu}: give one with --prices")
    plan = plan_budget(flops, args.unique_tokens, extrapolate=args.extrapolate)
    hours = flops / an_hour
    bill = prices.gpu_hours((hours, hours), gpu)
    if args.json:
        return json.dumps({**asdict(plan), "gpu_hours": hours, "bill": bill and asdict(bill)}, indent=2)
    spent = [(f"GPU-hours of a {gpu}", f"{hours:,.0f} at {args.mfu:.0%} MFU"), ("dollars", str(bill))]
    return format_table({"Budget": spent[: 2 if bill else 1], "Quokka's law": budget_rows(plan)})


def draw(recipe: Recipe, args: PlanArgs, plan: Plan) -> bytes:
    """A PNG: days (and dollars) by the number of GPUs, and goodput by the interval between checkpoints."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (time, failing) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    counts = [count for factor in range(-3, 4) if (count := round(args.gpus * 2.0**factor)) >= 1]
    plans = []
    for count in counts:
        try:
            plans.append(make_plan(recipe, replace(args, gpus=count)))
        except UserError:  # so many fail too often
            continue
    sizes = [each.training.gpus for each in plans]
    low, high = zip(*(each.days for each in plans), strict=True)
    time.fill_between(sizes, low, high, alpha=0.3, label="published utilisations, with failures")
    time.plot(sizes, [each.training.days for each in plans], "o-", label=f"{args.mfu:.0%} MFU, steps alone")
    time.set(xscale="log", yscale="log", xlabel=f"GPUs ({plan.training.gpu})", ylabel="days")
    time.set_title(str(plan.bill) if plan.bill else "no price", fontsize="small")
    time.legend()
    best = plan.failures.best_interval
    intervals = [best * 2 ** (step / 4) for step in range(-16, 33)]
    failing.plot([i / 60 for i in intervals], [plan.failures.goodput(i) for i in intervals])
    for name, interval in (("best", best), ("recipe", plan.checkpoint_every * plan.step_s)):
        failing.plot(interval / 60, plan.failures.goodput(interval), "o", label=name)
    failing.set(xscale="log", xlabel="minutes between checkpoints", ylabel="goodput")
    failing.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    run_command("plan")
