"""What came out, ours beside what is published: a table in Markdown or for a terminal, and a figure."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from llada.evals.benchmarks.published import Settings

HEADER = ("Benchmark", "Metric", "Shots", "Items", "Ours, %", "Published, %", "Difference", "Settings")


class Summary(TypedDict):
    """What came of one benchmark, as results.json has it."""

    name: str
    title: str
    metric: str
    filter: str
    """lm_eval's name of the rule by which the answer is found in a text."""
    tasks: list[str]
    """Of lm_eval, whose items these are."""
    place: str
    """Of their items below benchmarks/, where another benchmark asks the same tasks."""
    is_mean_of_tasks: bool
    is_share: bool
    """Whether the figure is a share of the items, and not a perplexity or the like."""
    value: float
    """A share of one, or the metric's own figure."""
    stderr: float | None
    items: int
    results: dict[str, float]
    """{source: what is published in per cent}."""
    settings: dict[str, Any]
    """All that the figure depends on beside the checkpoint and the items."""
    settings_hash: str
    given: list[str]
    """Settings that were given by hand in the place of published ones."""
    requests: int
    requests_cut: int
    """Of them, those that did not fit the context."""
    nfe: float
    """Forwards of a request, in the mean."""
    remark: str


def table_rows(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """The table's cells, its header first. A difference is in standard errors of ours, where there is one."""
    return [HEADER, *(_row(summary) for summary in summaries)]


def _row(summary: Summary) -> tuple[str, ...]:
    spread = summary["stderr"]
    if summary["is_share"]:
        ours = f"{100 * summary['value']:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")
    else:
        ours = f"{summary['value']:.4g}" + ("" if spread is None else f" ± {spread:.2g}") + " (no %)"
    published = ", ".join(f"{value:.1f} ({source})" for source, value in summary["results"].items())
    difference = ""
    if summary["results"]:
        gap = 100 * summary["value"] - next(iter(summary["results"].values()))
        difference = f"{gap:+z.1f}" + (f" ({abs(gap) / (100 * spread):.1f} s.e.)" if spread else "")
    shots = summary["settings"].get("num_fewshot")
    marks = ("*" if summary["given"] else "") + ("†" if summary["requests_cut"] else "")
    return (
        summary["title"],
        summary["metric"],
        "" if shots is None else str(shots),
        f"{summary['items']:,}",
        ours,
        published or "–",
        difference,
        summary["settings_hash"] + marks,
    )


def notes(summaries: Sequence[Summary]) -> list[str]:
    """What a reader must know of single rows."""
    lines = []
    for summary in summaries:
        title = summary["title"]
        if summary["given"]:
            lines.append(f"* {title}: not as published: {', '.join(summary['given'])}")
        if summary["requests_cut"]:
            lines.append(
                f"† {title}: {summary['requests_cut']:,} of {summary['requests']:,} requests did not fit the context: a prompt "
                "lost its beginning, an answer was scored in pieces, a gap has fewer masks than its solution has tokens"
            )
        if summary["remark"]:
            lines.append(f"{title}: {summary['remark']}")
    return lines


def to_markdown(
    summaries: Sequence[Summary], sources: dict[str, str], heading: str, settings: Settings | None = None
) -> str:
    """The table with its notes, what other models came to, the sources of what is published, and the settings behind each hash.

    `settings`: the published ones by which it was run.
    """
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in table_rows(summaries)]
    rows.insert(1, tuple("---" if name in HEADER[:2] else "---:" for name in HEADER))
    lines = [f"# {heading}", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    lines += [f"- {note}" for note in ["± one standard error over the items", *notes(summaries)]]
    if settings is not None:
        lines.append(f"- settings of {settings.title}: {settings.of}")
        for model, figures in settings.others.items():
            theirs = [f"{s['title']} {figures[s['name']]:.1f}" for s in summaries if s["name"] in figures]
            lines += [f"- {model}, as the paper has it: {', '.join(theirs)}"] if theirs else []
    named = [name for summary in summaries for name in summary["results"]]
    lines += [f"- {name}: {sources[name]}" for name in dict.fromkeys(named) if name in sources]
    lines += ["", "Settings:", ""]
    for summary in summaries:
        pairs = ", ".join(f"{name}={value}" for name, value in _flat(summary["settings"]))
        lines.append(f"- `{summary['settings_hash']}` {summary['title']}: {pairs}")
    return "\n".join(lines) + "\n"


def to_terminal(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, the first a header."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "─" * max(map(_width, lines)), *lines[1:]])


def draw(summaries: Sequence[Summary]) -> bytes:
    """An SVG: ours with one standard error, and all that is published, a line for each benchmark that is a share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    summaries = [summary for summary in summaries if summary["is_share"]]
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.35 * len(summaries)))
    for place, summary in enumerate(summaries):
        theirs = list(summary["results"].values())
        axes.plot(theirs, [place] * len(theirs), "D", color="#888888", markersize=5, zorder=1)
        error = [100 * (summary["stderr"] or 0)]
        axes.errorbar([100 * summary["value"]], [place], xerr=error, fmt="o", color="#1f77b4", capsize=3)
    axes.set_yticks(range(len(summaries)), [summary["title"] for summary in summaries])
    axes.invert_yaxis()
    axes.set_xlabel("%, ours (●, ± one standard error) and published (◆)")
    axes.grid(axis="x", alpha=0.3)
    buffer = io.BytesIO()
    # Without a date and with fixed names, so that the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "llada"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def mean_with_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, of the sample's variance as in lm_eval; None for one value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return pairs


def _width(text: str) -> int:
    """Columns on a terminal, where a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)
