"""The answers of a plan as lines of text: (what, how much) in sections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from llada.plan.budget import FITTED_FLOPS, BudgetPlan, most_epochs
from llada.plan.checkpoints import CheckpointPlan
from llada.plan.corpus import CorpusPlan
from llada.plan.failures import Failures, duration
from llada.plan.limits import Demand, first_to_break
from llada.plan.prices import Dollars
from llada.plan.published import PUBLISHED, mfu_range
from llada.plan.serving import ServingPlan
from llada.plan.training import TrainingCost
from llada.training.memory import GIB

Rows = Sequence[tuple[str, str]]


def format_table(sections: Mapping[str, Rows]) -> str:
    """The sections one after the other, the columns of each aligned."""
    blocks: list[str] = []
    for title, rows in sections.items():
        width = max(len(label) for label, _ in rows)
        blocks.append("\n".join([title, *(f"  {label:<{width}}  {text}" for label, text in rows)]))
    return "\n\n".join(blocks)


def training_rows(cost: TrainingCost) -> Rows:
    memory = cost.memory
    lowest, highest = mfu_range()
    return [
        (
            "parameters",
            f"{cost.parameters:,} ({cost.non_embedding_parameters:,} without embeddings)",
        ),
        ("tokens", f"{cost.tokens:,}"),
        ("training FLOPs", f"{cost.flops:.3g}"),
        (
            f"steps on {cost.gpus} × {cost.gpu}",
            f"{_days(cost.days)} at {cost.mfu:.0%} MFU, {_between(*map(_days, cost.days_range))} at the "
            f"{lowest:.0%} to {highest:.0%} of published runs",
        ),
        (
            "speed",
            f"{cost.tokens_per_second_per_gpu:,.0f} tokens/s per GPU, {cost.days * 24 * cost.gpus:,.0f} GPU-hours",
        ),
        (
            "a step per GPU",
            f"{cost.micro_batches} micro-batches of at most {cost.micro_rows} rows"
            + (f", {cost.filler:.1%} of all rows only fill up" if cost.filler else ""),
        ),
        (
            "memory per GPU",
            f"{memory.total / GIB:.1f} of {cost.memory_gib:.0f} GiB, fullest at the {memory.moment} "
            f"({memory.state / GIB:.1f} state, {memory.activations / GIB:.1f} activations, "
            f"{memory.workspace / GIB:.1f} workspace)"
            + ("" if cost.fits else f" — does not fit; what lowers it most: {cost.remedy}"),
        ),
        ("host memory per GPU", f"{cost.host_gib:.1f} GiB"),
    ]


def checkpoint_rows(plan: CheckpointPlan) -> Rows:
    return [
        ("size", f"{_size(plan.bytes)}, {plan.kept} kept: {_size(plan.kept_bytes)}"),
        (
            "saving one",
            f"steps stand still for {duration(plan.stall)}; written beside them in {_between(*map(duration, plan.write))}, "
            f"{duration(plan.plan)} of it worker 0's plan",
        ),
        ("going back to one", _between(*map(duration, plan.read))),
    ]


def failure_rows(failures: Failures, *, step_s: float, every: int, num_steps: int) -> Rows:
    """`every`: steps between two checkpoints, as the recipe has it, of a run of `num_steps`."""
    whole, now = num_steps * step_s, every * step_s
    best, longest = (min(whole, seconds) for seconds in (failures.best_interval, failures.longest_interval()))
    return [
        ("a failure", f"every {duration(failures.mtbf)}, {duration(failures.restart)} until the next step"),
        (
            "best interval",
            f"{duration(best)} (train.checkpoint_every {max(1, round(best / step_s)):,}): goodput "
            f"{failures.goodput(best):.2%}; up to {duration(longest)} ({int(longest / step_s):,} steps) loses at most 1 %",
        ),
        (
            "interval of the recipe",
            f"{duration(now)} ({every:,} steps): goodput {failures.goodput(now):.2%}",
        ),
    ]


def bill_rows(days: tuple[float, float], dollars: Dollars | None, missing: str) -> Rows:
    """`days` with failures; `missing`: what to say where there is no price."""
    return [
        ("days, with failures", _between(*map(_days, days))),
        ("training", missing if dollars is None else str(dollars)),
    ]


def corpus_rows(plan: CorpusPlan, cost: TrainingCost) -> Rows:
    passes = cost.tokens / plan.tokens
    most = most_epochs(cost.parameters, plan.tokens)
    return [
        (
            "tokens that are kept",
            f"{plan.tokens:,.0f}; {passes:,.2f} passes over them, of at most {most:,.0f} before the bound rises (Quokka)",
        ),
        (
            "storage",
            f"raw {_size(plan.raw_bytes)} compressed ({_size(plan.text_bytes)} of text), clean {_size(plan.clean_bytes)} "
            f"compressed, token shards {_size(plan.token_bytes)}",
        ),
        ("core-hours", _between(*(f"{hours:,.0f}" for hours in plan.core_hours))),
        (
            f"{plan.nodes} nodes, {plan.cores} busy cores each",
            f"{_between(*(duration(3600 * hours) for hours in plan.hours))}, most of it: {plan.bottleneck}",
        ),
        ("nodes and requests", str(plan.compute)),
        ("raw and tokens, a month", str(plan.storage)),
    ]


def serving_rows(plan: ServingPlan, hourly: Dollars | None, missing: str) -> Rows:
    return [
        (
            "a request",
            f"{plan.prompt_tokens} + {plan.gen_length} tokens: {plan.forwards:,.0f} forwards, {plan.token_forwards:,.0f} tokens "
            f"fed, {_between(*(f'{seconds:.2g}' for seconds in plan.gpu_seconds))} s of a {plan.gpu}",
        ),
        (
            f"{plan.requests_per_second:g} requests/s",
            f"{_between(*map(str, plan.replicas))} replicas of one GPU"
            + ("" if plan.fits else f" — {_size(plan.weights_bytes)} of weights do not fit into one"),
        ),
        ("an hour", missing if hourly is None else str(hourly)),
    ]


def budget_rows(plan: BudgetPlan) -> Rows:
    low, high = FITTED_FLOPS
    rows = [
        (
            "FLOPs",
            f"{plan.flops:.3g}"
            + (" — extrapolated" if plan.is_extrapolated else "")
            + f" (the law was fitted from {low:g} to {high:g})",
        ),
        ("parameters", f"{plan.parameters:,.3g}"),
        ("tokens", f"{plan.tokens:,.3g} ({plan.tokens / plan.parameters:,.0f} for each parameter)"),
    ]
    if plan.most_epochs is not None:
        limited = ""
        if plan.limited_by == "text":
            limited = f"; so little text makes use of {plan.used_flops / plan.flops:.1%} of the budget"
        rows.append(
            (
                "epochs",
                f"{plan.epochs:,.2f}, of at most {plan.most_epochs:,.0f} before the bound rises{limited}",
            )
        )
    if plan.loss is not None:
        rows.append(("expected bound", f"{plan.loss:.2f} nats per token (GPT-NeoX's vocabulary of 50,289)"))
    ablated, law = plan.learning_rate
    return [
        *rows,
        ("global_batch_tokens", f"{plan.batch_tokens:,.2g}"),
        (
            "learning rate",
            f"{ablated:.0e} (best of the paper's ablation at 1 B) to {law:.1e} (the law for AR)",
        ),
    ]


def published_rows(mfu: float) -> Rows:
    """How far planning at this utilisation is from runs whose cost is known."""
    return [
        (
            f"{run.gpu}: {run.tokens_per_second:,.0f} tokens/s",
            f"{run.mfu:.1%} MFU, planned GPU-hours {run.error(mfu):+.0%}: {run.name} ({run.source})",
        )
        for run in PUBLISHED
    ]


def limit_rows(demands: Sequence[Demand]) -> Rows:
    """All demands; the first that breaks, and what to do about each that does."""

    def text(demand: Demand) -> str:
        amount = _quantity(demand.amount, demand.unit)
        if demand.limit is None:
            return amount
        broken = f" — {demand.remedy}" if demand.share > 1 else ""
        return f"{amount} of {_quantity(demand.limit, demand.unit)} ({demand.share:.0%}){broken}"

    rows = [(f"{demand.room}: {demand.what}", text(demand)) for demand in demands]
    for room in dict.fromkeys(demand.room for demand in demands):
        broken = first_to_break([demand for demand in demands if demand.room == room])
        rows.append((f"{room}: first to break", broken[0].what if broken else "nothing at this size"))
    return rows


def _quantity(number: float, unit: str) -> str:
    if unit.startswith("bytes"):
        return _size(number) + unit.removeprefix("bytes")
    return duration(number) if unit == "s" else f"{number:,.3g} {unit}" if number < 100 else f"{number:,.0f} {unit}"  # fmt: skip


def _size(count: float) -> str:
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 0.1 else duration(86_400 * days)


def _between(*amounts: str) -> str:
    return " to ".join(_distinct(amounts))


def _distinct(amounts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(amounts))
