"""What `objectives.py` makes of its numbers: estimates with their errors, the table, the figure."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from twins import draw_figure, save_figure


def relative_variance(grams: torch.Tensor) -> tuple[float, float]:
    """tr Cov(g) / |E g|² of gradients g with its jackknife error, from the inner products (S, K, K) of K independent draws
    in each of S settings, over which both are averaged; unbiased above and below the line."""

    def ratio(gram: torch.Tensor) -> float:
        K = gram.shape[-1]
        squares = gram.diagonal(dim1=1, dim2=2).sum(1)
        products = gram.sum((1, 2)) - squares  # of different draws
        mean = products / (K * (K - 1))
        return float(((squares / K - mean).mean()) / mean.mean())

    K = grams.shape[-1]
    without = []
    for draw in range(K):
        rest = torch.arange(K) != draw
        without.append(ratio(grams[:, rest][:, :, rest]))
    spread = statistics.pvariance(without) * (K - 1)
    return ratio(grams), spread**0.5


def table(report: dict[str, Any]) -> str:
    """Markdown, best bound first."""
    lines = [
        f"| objective | nats per byte | − {report['base']} | rate | loss ± early, final | gradient variance early, final |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(report["rows"], key=lambda row: row["bound"][0]):
        bound, difference = ("{:.3f} ± {:.3f}".format(*row[key]) for key in ("bound", "difference"))
        if row["arm"] == report["base"]:
            difference = "–"
        early, final = row["noise"]["early"], row["noise"]["final"]
        losses = f"{early['loss_std']:.2f}, {final['loss_std']:.2f}" if early else "–"
        gradients = (
            ", ".join(
                f"{part['gradient_variance']:.2g} ± {part['standard_error']:.1g}" for part in (early, final)
            )
            if early
            else "–"
        )
        lines.append(f"| {row['arm']} | {bound} | {difference} | {row['rate']:g} | {losses} | {gradients} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], target: Path) -> None:
    """Each seed's bound, and the variance of the gradient, by arm."""
    rows = sorted(report["rows"], key=lambda row: -row["bound"][0])
    places = range(len(rows))
    figure, (left, right) = draw_figure(height=5, sharey=True)
    for place, row in zip(places, rows, strict=True):
        left.scatter(row["bounds"], [place] * len(row["bounds"]), color="tab:blue", alpha=0.5, s=20)
        left.plot(row["bound"][0], place, "|", color="black", markersize=14)
        for weights, colour in (("early", "tab:orange"), ("final", "tab:green")):
            if part := row["noise"][weights]:
                right.errorbar(
                    part["gradient_variance"],
                    place,
                    xerr=part["standard_error"],
                    fmt="o",
                    color=colour,
                    markersize=5,
                    label=f"{weights} weights" if place == len(rows) - 2 else None,
                )
    left.axvline(report["unigram"], color="grey", linestyle="--", linewidth=1, label="unigram")
    left.set_yticks(list(places), [row["arm"] for row in rows])
    left.set_xlabel("bound on held-out text, nats per byte (| mean)")
    left.legend(loc="lower left")
    right.set_xscale("log")
    right.set_xlabel("variance of the gradient / its mean squared")
    right.legend(loc="upper right")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    save_figure(figure, target)
