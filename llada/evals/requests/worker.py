"""What works on blocks of requests, wherever a checkpoint is open: scores of pairs, and texts behind prompts.

Requests and what is found are JSON, so that a block may be worked on in another process and its result kept in a file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from transformers import PreTrainedTokenizerFast

from llada.evals.autoregressive.writing import complete_left_to_right
from llada.evals.evaluation import Block, OpenModel
from llada.evals.requests.scoring import Pair, ScoreConfig, num_forwards, score_pairs
from llada.model.transformer import Transformer
from llada.sampling.completions import complete_texts
from llada.sampling.config import SamplingConfig
from llada.sampling.text import load
from llada.settings import from_dict

_log = logging.getLogger(__name__)


class RequestBlock(Block):
    """Requests."""

    num_requests: int
    """As progress counts them."""


Asked = tuple[list[int], list[int], list[int] | None]
"""The fields of a `Pair`, as JSON has them."""


class ScoreBlock(RequestBlock):
    """Pairs of token ids to score, by the same settings."""

    pairs: list[Asked]
    score: dict[str, Any]
    """Settings of ScoreConfig, but for `max_tokens`."""


class WriteBlock(RequestBlock):
    """Prompts to complete, by the same settings."""

    prompts: list[list[int]]
    suffixes: list[list[int]]
    """Behind each text; empty where it is no gap."""
    seeds: list[int]
    sampling: dict[str, Any]
    stop: list[str]


class Cost(TypedDict):
    """What a request took."""

    nfe: int
    """Forwards of its text, or of the estimate of its likelihood."""
    seconds: float
    """Its share of the time of its block, whose requests are worked on together."""
    dtype: str
    """Precision of the network that worked on it, such as "bfloat16"."""


class Scored(Cost):
    """A pair's score (see llada.evals.requests.scoring.Score)."""

    log_p: float
    is_greedy: bool


class Written(Cost):
    """A text."""

    text: str
    reveal_step: list[int]
    """The forward, from 0, at which each of its tokens was committed; -1: it was given."""


@dataclass(frozen=True)
class Setup:
    """What a process needs to work on blocks."""

    open_model: OpenModel
    max_tokens: int
    """That one forward is fed, at least one row."""
    max_rows: int | None = None
    """Of a forward at the most; None: as many as `max_tokens` allows."""

    def build_scorer(self) -> Callable[[ScoreBlock], list[Scored]]:
        """Open the checkpoint; what scores blocks."""
        return Worker(self).score

    def build_writer(self) -> Callable[[WriteBlock], list[Written]]:
        """Open the checkpoint; what completes blocks."""
        return Worker(self).write


class Worker:
    """A process' checkpoint."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._model, self._tokenizer = setup.open_model(fast=True)
        self._dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")

    def score(self, block: ScoreBlock) -> list[Scored]:
        """A score for each pair."""
        config = from_dict(ScoreConfig, {**block["score"], "max_tokens": self._setup.max_tokens})
        pairs = [Pair(*pair) for pair in block["pairs"]]
        begin = time.perf_counter()
        scores = score_pairs(self._model, pairs, config, max_rows=self._setup.max_rows)
        forwards = [num_forwards(self._model, pair, config) for pair in pairs]
        fed = [len(pair.context) + len(pair.continuation) for pair in pairs]
        seconds = _shares(
            time.perf_counter() - begin, [n * row for n, row in zip(forwards, fed, strict=True)]
        )
        return [
            {
                "log_p": score.log_p,
                "is_greedy": score.is_greedy,
                "nfe": nfe,
                "seconds": share,
                "dtype": self._dtype,
            }
            for score, nfe, share in zip(scores, forwards, seconds, strict=True)
        ]

    def write(self, block: WriteBlock) -> list[Written]:
        """A text for each prompt."""
        assert self._tokenizer is not None  # HarnessModel has seen it
        max_tokens = self._setup.max_tokens
        max_rows = self._setup.max_rows or max_tokens
        begin = time.perf_counter()
        sampling = from_dict(SamplingConfig, block["sampling"])
        if self._model.config.causal:
            written = complete_left_to_right(
                self._model,
                self._tokenizer,
                block["prompts"],
                sampling,
                stop=block["stop"],
                seed=block["seeds"],
                max_rows=max_rows,
                max_tokens=max_tokens,
            )
        else:
            written = complete_texts(
                self._model,
                self._tokenizer,
                block["prompts"],
                sampling,
                suffixes=block["suffixes"],
                stop=block["stop"],
                seed=block["seeds"],
                max_rows=max_rows,
                max_tokens=max_tokens,
            )
        seconds = _shares(time.perf_counter() - begin, [line["nfe"] for line in written])
        return [
            {
                "text": line["text"],
                "nfe": line["nfe"],
                "seconds": share,
                "reveal_step": line["reveal_step"],
                "dtype": self._dtype,
            }
            for line, share in zip(written, seconds, strict=True)
        ]


def _shares(seconds: float, weights: Sequence[int]) -> list[float]:
    """The time shared out by the weights."""
    whole = max(sum(weights), 1)
    return [round(seconds * weight / whole, 6) for weight in weights]


def open_folder(
    folder: str, device: str | None, dtype: str | None, *, fast: bool
) -> tuple[Transformer, PreTrainedTokenizerFast | None]:
    """An `OpenModel` for a local folder, in the precision that is asked for or in the file's."""
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        _log.warning(
            "there is no device %s on this machine: working on the CPU", device
        )  # lm_eval names it unasked
        device = "cpu"
    return load(folder, device=device, dtype=dtype)
