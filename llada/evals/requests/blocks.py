"""Requests cut into blocks, those of like length together, so that a forward holds little padding and what a block takes is about
the same for each of its requests; and answers put back in the order in which was asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from llada.evals.requests.scoring import ScoreConfig
from llada.evals.requests.worker import Asked, ScoreBlock, Scored, WriteBlock

_REQUESTS_PER_BLOCK = 64


class TextRequest(NamedTuple):
    """A text to write."""

    prompt: list[int]
    sampling: dict[str, Any]
    stop: list[str]
    suffix: list[int]
    """What stands behind it, where it fills a gap."""


def score_blocks(
    asked: Sequence[Asked], score: ScoreConfig, max_length: int
) -> tuple[list[ScoreBlock], list[int]]:
    """Blocks of the pieces (`windows`) of pairs; and of each piece, in their order, whose it is."""
    # How much a forward is fed changes no score.
    settings = {name: value for name, value in asdict(score).items() if name != "max_tokens"}
    pieces: list[Asked] = []
    owners: list[int] = []
    for number, pair in enumerate(asked):
        own = list(windows(*pair, max_length))
        pieces += own
        owners += [number] * len(own)
    order = sorted(range(len(pieces)), key=lambda n: (len(pieces[n][0]) + len(pieces[n][1]), n))
    blocks: list[ScoreBlock] = []
    for start in range(0, len(order), _REQUESTS_PER_BLOCK):
        pairs = [pieces[n] for n in order[start : start + _REQUESTS_PER_BLOCK]]
        blocks.append(
            {"name": f"{start:010d}", "num_requests": len(pairs), "pairs": pairs, "score": settings}
        )
    return blocks, [owners[n] for n in order]


def add_up(count: int, owners: Iterable[int], scores: Iterable[Scored]) -> list[Scored]:
    """The scores of `count` pairs from those of their pieces."""
    found: list[Scored] = [
        {"log_p": 0.0, "is_greedy": True, "nfe": 0, "seconds": 0.0, "dtype": ""} for _ in range(count)
    ]
    for owner, score in zip(owners, scores, strict=True):
        whole = found[owner]
        whole["log_p"] += score["log_p"]
        whole["is_greedy"] = whole["is_greedy"] and score["is_greedy"]
        whole["nfe"] += score["nfe"]
        whole["seconds"] += score["seconds"]
        whole["dtype"] = score["dtype"]
    return found


def windows(
    context: list[int], continuation: list[int], noise_of: list[int] | None, max_length: int
) -> Iterator[Asked]:
    """The continuation in pieces that fit, each behind as much of what precedes it as fits beside it, at least a token. Its masks are
    those of all that precedes it, however much of that fits: choices of unlike lengths share them, and two pieces do not."""
    before, whole = list(context), list(context if noise_of is None else noise_of)
    for start in range(0, len(continuation), max_length - 1):
        piece = continuation[start : start + max_length - 1]
        fitting = before[max(0, len(before) - (max_length - len(piece))) :]
        yield fitting, piece, None if fitting == whole else list(whole)
        before += piece
        whole += piece


def write_blocks(requests: Sequence[TextRequest], seed: int) -> tuple[list[WriteBlock], list[int]]:
    """Blocks of texts by the same settings; and of each text, in their order, the number of its request, from which its seed
    follows."""
    kinds: list[tuple[dict[str, Any], list[str]]] = []
    of: list[int] = []
    for request in requests:
        kind = (request.sampling, request.stop)
        if kind not in kinds:
            kinds.append(kind)
        of.append(kinds.index(kind))
    given = [len(request.prompt) + len(request.suffix) for request in requests]
    order = sorted(range(len(requests)), key=lambda n: (of[n], given[n], n))
    blocks: list[WriteBlock] = []
    last = None
    for place, number in enumerate(order):
        if last != of[number] or blocks[-1]["num_requests"] == _REQUESTS_PER_BLOCK:
            last = of[number]
            sampling, stop = kinds[last]
            blocks.append(
                {
                    "name": f"{place:010d}",
                    "num_requests": 0,
                    "prompts": [],
                    "suffixes": [],
                    "seeds": [],
                    "sampling": sampling,
                    "stop": stop,
                }
            )
        blocks[-1]["prompts"].append(requests[number].prompt)
        blocks[-1]["suffixes"].append(requests[number].suffix)
        blocks[-1]["seeds"].append(seed + number)
        blocks[-1]["num_requests"] += 1
    return blocks, order
