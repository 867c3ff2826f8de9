"""loss_by_noise.png of a training folder: how hard a masked token is, by how much is masked around it, as training goes on."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from llada.files import join, write_bytes
from llada.training.events import StepDone, Validated

NOISE_PLOT = "loss_by_noise.png"
# Curves of one picture.
_PARTS = 4
# Share of a curve's masked tokens below which a level is not drawn: a bandwidth's edge brings a handful. Of uniform levels the
# lowest tenth has 0.01.
_LEAST_SHARE = 0.002


def plot_loss_by_noise(events: Sequence[StepDone | Validated], output: str, title: str) -> bool:
    """Draw a run's mean loss of masked tokens by mask probability, a curve for each quarter of the run, into the folder's
    loss_by_noise.png; False, and no picture, for a run that masks nothing."""
    logged = [event for event in events if isinstance(event, StepDone) and event.noise_tokens]
    if not logged:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    parts = [part for part in np.array_split(np.arange(len(logged)), _PARTS) if len(part)]
    for number, part in enumerate(parts, start=1):
        levels, nats = loss_curve([logged[place] for place in part])
        shade = plt.get_cmap("viridis_r")(number / len(parts))
        label = f"steps up to {logged[part[-1]].step:,}"
        axes.plot(levels, nats, "o-", label=label, color=shade, linewidth=1, markersize=4)
    if validations := [event for event in events if isinstance(event, Validated)]:
        unigram = validations[-1].loss / validations[-1].ratio
        axes.axhline(unigram, color="gray", linestyle="--", linewidth=1, label="unigram baseline")
    axes.set(xlabel="mask probability", ylabel="nats per masked token", title=title, xlim=(0, 1))
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    plt.close(figure)
    write_bytes(join(output, NOISE_PLOT), buffer.getvalue())
    return True


def loss_curve(logged: Sequence[StepDone]) -> tuple[np.ndarray, np.ndarray]:
    """(the middles of the noise levels that had tokens enough, the mean loss of these), each (levels,)."""
    tokens = np.array([event.noise_tokens for event in logged], dtype=np.float64)
    sums = (np.array([event.noise_nats for event in logged]) * tokens).sum(0)
    middles, tokens = (np.arange(tokens.shape[1]) + 0.5) / tokens.shape[1], tokens.sum(0)
    seen = tokens > _LEAST_SHARE * tokens.sum()
    return middles[seen], sums[seen] / tokens[seen]
