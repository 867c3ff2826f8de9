"""What a traced row keeps of its commits, for those who ask how a reply came to be: which forward each token came from, how
likely the model called it there, and what else it might have been."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from llada.sampling.draw import confidence, likeliest_tokens

if TYPE_CHECKING:
    from llada.sampling.canvas import Canvas


def record(canvas: Canvas, row: Tensor, column: Tensor, logits: Tensor, tokens: Tensor) -> None:
    """Note that `tokens` (n,) are committed at (row, column) of the canvas, each (n,); `logits` (n, V) at least float32, without
    temperature, at −∞ for what must not stand there."""
    canvas.confidence[row, column] = confidence(logits, tokens).cpu()
    wanted = canvas.num_top[row]
    if not bool(wanted.any()):
        return
    # One more than wanted: the mask may be among them where the row is told what it writes, and is no text.
    ids, log_probs = (values.tolist() for values in likeliest_tokens(logits, int(wanted.max()) + 1))
    for n, (r, c) in enumerate(zip(row.tolist(), column.tolist(), strict=True)):
        canvas.top_of[r, c] = len(canvas.tops[r])
        pairs = zip(ids[n], log_probs[n], strict=True)
        own = [
            (token, log_prob) for token, log_prob in pairs if log_prob > -math.inf and token != canvas.mask_id
        ]
        canvas.tops[r].append(tuple(own[: int(wanted[n])]))


class Trace(NamedTuple):
    """What some columns of a row tell."""

    block: tuple[int, int]
    """The columns [from, to) of the block that the row works on."""
    blocks: tuple[int, ...]
    """In which block each stands."""
    steps: tuple[int | None, ...]
    """Which of the row's forwards committed the token; None where none did."""
    confidences: tuple[float | None, ...]
    """The model's probability of it then; None where none did."""
    tops: tuple[tuple[tuple[int, float], ...], ...]
    """The likeliest ids then with the logarithms of their probabilities, as many as were asked for and are possible."""


def read_trace(canvas: Canvas, row: int, begin: int, end: int) -> Trace:
    """How the tokens in the columns [begin, end) came to be there."""
    own = row, slice(begin, end)
    steps = (None if step < 0 else step for step in canvas.reveal_step[own].tolist())
    sure = (None if math.isnan(value) else value for value in canvas.confidence[own].tolist())
    tops = (() if at < 0 else canvas.tops[row][at] for at in canvas.top_of[own].tolist())
    block = int(canvas.block_begin[row]), int(canvas.block_end[row])
    return Trace(block, tuple(canvas.block_of[own].tolist()), tuple(steps), tuple(sure), tuple(tops))


def log_prob_of(confidence: float) -> float:
    """Its logarithm, a number also where the probability is less than floats can tell from 0."""
    return math.log(max(confidence, 1e-300))
