"""Two results of the task "benchmarks" against each other, item by item: paired bootstrap intervals of the differences.

Both models have answered the same questions, so that a question that is hard for one is mostly hard for the other: the difference is
known better than either figure.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llada.errors import UserError
from llada.evals.local_rows import field_of, is_finite, read_text, rows_of
from llada.files import exists, join
from llada.settings import check_limits, flatten_settings, limited

# Of a benchmark in results.json, what is needed here.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "title": str,
    "metric": str,
    "filter": str,
    "tasks": list,
    "is_mean_of_tasks": bool,
    "is_share": bool,
    "value": (int, float),
    "settings": dict,
    "settings_hash": str,
}


@dataclass(frozen=True)
class CompareConfig:
    """How the intervals are made."""

    resamples: int = limited(10_000, low=100)
    confidence: float = limited(0.95, above=0, below=1)
    seed: int = 0

    def __post_init__(self) -> None:
        check_limits(self, "compare")


class Difference(NamedTuple):
    """Of one benchmark, over the items that both have."""

    name: str
    title: str
    items: int
    a: float
    b: float
    difference: float
    """b − a."""
    low: float
    high: float
    """The interval of the difference; NaN where a task has one item, of whose spread nothing is known."""
    is_share: bool
    """Whether a table has it in per cent."""


class Comparison(NamedTuple):
    """All that two results have in common, and what they have not, a line each."""

    differences: list[Difference]
    remarks: list[str]


def compare(a: str, b: str, config: CompareConfig = CompareConfig()) -> Comparison:
    """Compare two outputs of `llada evaluate`, folders or their results.json.

    Raises UserError: no such results, none of benchmarks, nothing in common.
    """
    first, second = _Results(a), _Results(b)
    differences: list[Difference] = []
    remarks = [
        f"{name} is only in {one.folder}"
        for one, other in ((first, second), (second, first))
        for name in one.benchmarks
        if name not in other.benchmarks
    ]
    for name in first.benchmarks:
        if name not in second.benchmarks:
            continue
        one, other = first.benchmarks[name], second.benchmarks[name]
        if one["settings_hash"] != other["settings_hash"]:
            remarks.append(f"{name}: other settings ({_changed(one, other)})")
        if (one["metric"], one["filter"]) != (other["metric"], other["filter"]):
            remarks.append(f"{name}: other metrics, not compared: {one['metric']} and {other['metric']}")
            continue
        mine, theirs = first.items(name), second.items(name)
        if other := next(
            (each for each, items in ((first, mine), (second, theirs)) if not each.is_mean(name, items)), None
        ):
            figure = f"{one['metric']}, {other.benchmarks[name]['value']:.4g} in {other.folder}"
            remarks.append(f"{name}: {figure}, is no mean of its items, not compared")
            continue
        common = [key for key in mine if key in theirs]
        for results, count in ((first, len(mine) - len(common)), (second, len(theirs) - len(common))):
            if count:
                remarks.append(f"{name}: {count:,} items are only in {results.folder}")
        if not common:
            remarks.append(f"{name}: no item is in both, not compared")
            continue
        groups = _groups({key: (mine[key], theirs[key]) for key in common}, one["is_mean_of_tasks"])
        low, high = bootstrap_interval([pairs[:, 1] - pairs[:, 0] for pairs in groups], config)
        mean_a, mean_b = np.mean([pairs.mean(0) for pairs in groups], 0).tolist()
        difference = Difference(
            name, one["title"], len(common), mean_a, mean_b, mean_b - mean_a, low, high, one["is_share"]
        )
        differences.append(difference)
        if alone := sum(len(pairs) == 1 for pairs in groups):
            where = "" if len(groups) == 1 else f" of {alone} of its {len(groups)} tasks"
            remarks.append(f"{name}: one item{where} is in both, which says nothing of others")
    if not differences:
        raise UserError(f"{a} and {b} have nothing to compare" + "".join(f"; {text}" for text in remarks))
    return Comparison(differences, remarks)


def bootstrap_interval(groups: Sequence[NDArray[Any]], config: CompareConfig) -> tuple[float, float]:
    """The percentile interval of the mean over groups of the means of values drawn from each with replacement; NaN where a group has
    one value."""
    if any(len(group) == 1 for group in groups):
        return math.nan, math.nan
    generator = np.random.default_rng(config.seed)
    means = np.zeros(config.resamples)
    for group in groups:
        # How often each of the few values is drawn is multinomial: what drawing items one by one would give.
        values, counts = np.unique(group, return_counts=True)
        drawn = generator.multinomial(len(group), counts / len(group), size=config.resamples)
        means += drawn @ values / len(group) / len(groups)
    tail = 50 * (1 - config.confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def comparison_rows(found: Comparison, config: CompareConfig) -> list[tuple[str, ...]]:
    """A table's cells, its header first; shares in per cent."""
    interval = f"{100 * config.confidence:g} % interval"
    rows: list[tuple[str, ...]] = [("Benchmark", "Items", "A", "B", "B − A", interval)]
    for d in found.differences:
        factor, unit = (100, " %") if d.is_share else (1, "")
        figures = [f"{factor * value:.1f}{unit}" for value in (d.a, d.b)]
        span = "n/a" if math.isnan(d.low) else f"[{_signed(factor * d.low)}, {_signed(factor * d.high)}]"
        rows.append((d.title, f"{d.items:,}", *figures, _signed(factor * d.difference), span))
    return rows


def _signed(value: float) -> str:
    return f"{value:+z.1f}"  # z: no -0.0


class _Key(NamedTuple):
    """An item: its task, what it holds, and which it is of those that hold the same."""

    task: str
    content: str
    number: int


class _Results:
    """One output."""

    def __init__(self, place: str) -> None:
        self.folder = place.rstrip("/").removesuffix("/results.json")
        url = join(self.folder, "results.json")
        if not exists(url):
            raise UserError(f"{place} is no finished output of llada evaluate: there is no {url}")
        try:
            results = json.loads(read_text(url))
        except ValueError as error:
            raise UserError(f"{url} is no JSON: {error}") from None
        benchmarks = results.get("benchmarks") if isinstance(results, dict) else None
        if not isinstance(benchmarks, dict) or not benchmarks:
            raise UserError(f"{url} holds no benchmarks: they are made by --tasks benchmarks")
        for name, summary in benchmarks.items():
            place = f"{url}, benchmark {name}"
            if not isinstance(summary, dict):
                raise UserError(f"{place} is no JSON object; evaluate again")
            for field, kind in _FIELDS.items():
                field_of(summary, field, kind, place)
        self.benchmarks: dict[str, Any] = benchmarks

    def is_mean(self, name: str, items: Mapping[_Key, float]) -> bool:
        """Whether a benchmark's figure in the table is the mean of its items, and not a perplexity, a correlation or the like."""
        summary = self.benchmarks[name]
        means = [group.mean() for group in _groups(items, summary["is_mean_of_tasks"])]
        return bool(means) and math.isclose(np.mean(means), summary["value"], rel_tol=1e-6, abs_tol=1e-9)

    def items(self, name: str) -> dict[_Key, float]:
        """{item: its figure} of a benchmark."""
        summary = self.benchmarks[name]
        found: dict[_Key, float] = {}
        for task in summary["tasks"]:
            seen: Counter[str] = Counter()
            place = summary.get("place", "")  # results of before have none
            url = join(self.folder, "benchmarks", f"{place}{task}.jsonl")
            for number, row in enumerate(rows_of(url), start=1):
                value = row.get(summary["metric"])
                rule, content = (
                    field_of(row, field, str, f"{url}, row {number}") for field in ("filter", "doc_hash")
                )
                if rule == summary["filter"] and isinstance(value, int | float):
                    if not is_finite(value):
                        raise UserError(
                            f"{url}, row {number}: {summary['metric']} is {value!s:.40}, which has no mean; evaluate again"
                        )
                    found[_Key(task, content, seen[content])] = float(value)
                    seen[content] += 1
        return found


def _groups(
    items: Mapping[_Key, float | tuple[float, float]], is_mean_of_tasks: bool
) -> list[NDArray[np.float64]]:
    """The figures of all items together, or of each task, where tasks count the same: (items,) or (items, 2) each."""
    groups: dict[str, list[Any]] = {}
    for key, figure in items.items():
        groups.setdefault(key.task if is_mean_of_tasks else "", []).append(figure)
    return [np.array(group) for group in groups.values()]


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """ "sampling.block_length 8 / 32, …", as far as a line reaches."""
    a, b = flatten_settings(one["settings"]), flatten_settings(other["settings"])
    names = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
    told = [f"{name} {a.get(name, '–')} / {b.get(name, '–')}" for name in names[:6]]
    return ", ".join([*told, *([f"{len(names) - 6} more"] if len(names) > 6 else [])])
