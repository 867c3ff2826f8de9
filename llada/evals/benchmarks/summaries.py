"""What a benchmark came to, and by which settings: the rows of the table (table.py) from lm_eval's results.

A benchmark of the papers is one row, and so are a task of lm_eval and a group with a figure of its own, which lm_eval makes of its
tasks. A tag, and a group without one, is a row for each of its tasks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llada.errors import UserError
from llada.evals.autoregressive.writing import settings_in_force
from llada.evals.benchmarks.catalogue import Benchmark
from llada.evals.benchmarks.published import Protocol, settings_hash
from llada.evals.benchmarks.table import Summary, mean_with_error
from llada.sampling.config import SamplingConfig
from llada.settings import from_dict

if TYPE_CHECKING:
    from llada.evals.harness import HarnessModel


@dataclass(frozen=True)
class Plan:
    """One benchmark, ready to run."""

    protocol: Protocol
    benchmark: Benchmark | None
    """None: a task, a group or a tag of lm_eval."""
    loaded: dict[str, Any]
    """As lm_eval's evaluator takes them: {"tasks": {name: task}, "groups": …}."""
    model: HarnessModel


def settings_of(how: Protocol, model: HarnessModel, tasks: Sequence[Any]) -> dict[str, Any]:
    """All that the figures depend on beside the checkpoint and the documents. Raises UserError for an answer that does not fit the
    context."""
    settings: dict[str, Any] = {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "run_as": how.run_as,
        "num_fewshot": max(task.config.num_fewshot or 0 for task in tasks),
        "chat": how.chat,
    }
    if any(task.OUTPUT_TYPE != "generate_until" for task in tasks):
        # How many tokens a forward is fed changes no figure.
        score = {name: value for name, value in asdict(how.score).items() if name != "max_tokens"}
        if model.writer.is_causal:
            score = {"rule": "exact"}
        elif how.score.rule != "monte_carlo":
            del score["num_samples"], score["seed"]
        settings["score"] = score
    for task in tasks:
        if task.OUTPUT_TYPE == "generate_until":
            wishes = task.config.generation_kwargs
            # A gap is as long as its answer, where nothing else is said.
            own_length = "gap" in wishes and how.gen_length is None
            sampling, stop = model.writer.settings({**({"max_gen_toks": 1} if own_length else {}), **wishes})
            config = from_dict(SamplingConfig, sampling)
            in_force = settings_in_force(config) if model.writer.is_causal else config.in_force()
            settings["sampling"], settings["stop"] = {**in_force, "seed": how.score.seed}, stop
            if "gap" in wishes:
                settings["is_infilling"] = True
            if own_length:
                settings["sampling"]["gen_length"] = "as the answer"
    return settings


def summarize(plan: Plan, found: Mapping[str, Any], place: str, limit: int | None) -> dict[str, Summary]:
    """{name: what came of it}, its rows in the table.

    Args:
        found: what lm_eval's evaluator gives back.
        place: of the items' records (`Summary`).
        limit: documents of each task, from its start.
    """
    how, tasks = plan.protocol, list(found["samples"])
    own = found["results"].get(how.run_as, {})
    if plan.benchmark is not None:
        metric, chosen = plan.benchmark.metric, plan.benchmark.filter
        value, error = _headline(plan.benchmark, found["samples"])
        row = _Row(
            how.name,
            plan.benchmark.title,
            tasks,
            metric,
            chosen,
            value,
            error,
            plan.benchmark.is_mean_of_tasks,
        )
        return {how.name: _summary(plan, row, found, place, limit, plan.benchmark.remark)}
    if _has_figure(own):
        is_mean_of_tasks, remark = False, ""
        if how.run_as in plan.loaded["groups"]:
            is_mean_of_tasks = not _is_weighted(plan.loaded["groups"][how.run_as], _first_figure(own)[0])
            of = "its tasks' figures" if is_mean_of_tasks else "the items of all its tasks"
            remark = f"lm_eval's own figure of the group, the mean over {of}, {len(tasks)} tasks"
        row = _Row(how.name, how.name, tasks, *_first_figure(own), is_mean_of_tasks)
        return {how.name: _summary(plan, row, found, place, limit, remark)}
    rows = [
        _Row(f"{how.name}/{task}", task, [task], *_first_figure(found["results"][task]), False)
        for task in tasks
        if _has_figure(found["results"][task])
    ]
    if not rows:
        raise UserError(f"lm_eval has no figure for {how.name}")
    remark = f"one of {len(tasks)} tasks of {how.name}, which has no figure of its own"
    return {row.name: _summary(plan, row, found, place, limit, remark) for row in rows}


@dataclass(frozen=True)
class _Row:
    name: str
    title: str
    tasks: list[str]
    metric: str
    filter: str
    value: float
    stderr: float | None
    is_mean_of_tasks: bool


def _summary(
    plan: Plan, row: _Row, found: Mapping[str, Any], place: str, limit: int | None, remark: str
) -> Summary:
    how = plan.protocol
    samples = {task: found["samples"][task] for task in row.tasks}
    records = [
        record for (task, _), group in plan.model.records.items() if task in samples for record in group
    ]
    settings = {
        **settings_of(how, plan.model, [plan.loaded["tasks"][task] for task in row.tasks]),
        **({} if limit is None else {"limit": limit}),
        "asked": _digest(samples),
        "dtype": ", ".join(sorted({record["dtype"] for record in records} - {""})),
    }
    return {
        "name": row.name,
        "title": row.title,
        "metric": row.metric,
        "filter": row.filter,
        "tasks": row.tasks,
        "place": place,
        "is_mean_of_tasks": row.is_mean_of_tasks,
        "is_share": plan.benchmark is not None or (_is_share(plan, row) and 0 <= row.value <= 1),
        "value": row.value,
        "stderr": row.stderr,
        "items": sum(len({sample["doc_id"] for sample in group}) for group in samples.values()),
        "results": how.results if row.name == how.name else {},
        "settings": settings,
        "settings_hash": settings_hash(settings),
        "given": list(how.given),
        "requests": len(records),
        "requests_cut": sum(record["is_cut"] for record in records),
        "nfe": sum(record["nfe"] for record in records) / max(len(records), 1),
        "remark": "; ".join(filter(None, (remark, how.note))),
    }


def _digest(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Stands for what was asked, wherever it came from: documents, right answers, and prompts with their examples (and the chat
    template, where it has one)."""
    lines = [
        " ".join(
            [task, str(sample["doc_id"]), sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]]
        )
        for task, group in samples.items()
        for sample in group
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _is_share(plan: Plan, row: _Row) -> bool:
    """Whether a task of lm_eval counts what is right; others are perplexities and the like."""
    from lm_eval.api.metrics import mean

    return all(plan.loaded["tasks"][task].aggregation().get(row.metric) is mean for task in row.tasks)


def _is_weighted(group: Any, metric: str) -> bool:
    """Whether lm_eval's group weights its tasks by their items."""
    return all(each.weight_by_size for each in group.aggregate_metric_list if each.metric == metric)


def _headline(
    benchmark: Benchmark, samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[float, float | None]:
    """A benchmark's figure over all of its tasks, and its standard error."""
    values = [
        [float(sample[benchmark.metric]) for sample in group if sample["filter"] == benchmark.filter]
        for group in samples.values()
    ]
    if not benchmark.is_mean_of_tasks:
        return mean_with_error([value for group in values for value in group])
    parts = [mean_with_error(group) for group in values]
    errors = [error for _, error in parts if error is not None]
    spread = sum(error**2 for error in errors) ** 0.5 / len(parts) if len(errors) == len(parts) else None
    return sum(mean for mean, _ in parts) / len(parts), spread


def _first_figure(metrics: Mapping[str, Any]) -> tuple[str, str, float, float | None]:
    """The metric that lm_eval names first: (name, filter, figure, its standard error)."""
    key = next(filter(lambda key: _is_figure(key, metrics[key]), metrics))
    metric, _, chosen = key.partition(",")
    error = metrics.get(f"{metric}_stderr,{chosen}")
    return metric, chosen, float(metrics[key]), float(error) if isinstance(error, int | float) else None


def _has_figure(metrics: Mapping[str, Any]) -> bool:
    return any(_is_figure(key, value) for key, value in metrics.items())


def _is_figure(key: str, value: object) -> bool:
    metric, comma, _ = key.partition(",")
    return bool(comma) and isinstance(value, int | float) and not metric.endswith("_stderr")
