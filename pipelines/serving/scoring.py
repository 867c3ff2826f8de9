"""The likelihood of a prompt, for `echo` with `logprobs`: requests to the engine that are told what they write.

By the chain rule (llada/diffusion/chain.py) the masks of a text go from left to right, and each token's probability is that given
the ones before it. By LLaDA's Monte-Carlo bound (llada/diffusion/likelihood.py) some tokens are masked at random and written at once, many times;
Σ −log p · T/l of a sample is an estimate, and each token's part of it is what is told of the token. Both are the numbers that
these two modules give, and that benchmarks are scored with.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from llada.diffusion.likelihood import mask_exactly, stratified_counts
from llada.model.predict import network_block
from llada.sampling.blocks import count_blocks
from llada.sampling.config import SamplingConfig
from llada.sampling.engine import DenoiseEngine
from llada.sampling.events import Finished, Started, Text, Token
from llada.sampling.request import GenerateRequest
from pipelines.serving.errors import RequestError

_WAVE = 32  # requests that are laid out at a time


class Score:
    """log p of ids[begin:] given those before; known when `score_prompts` has run it."""

    def __init__(
        self,
        engine: DenoiseEngine,
        ids: Sequence[int],
        *,
        begin: int = 0,
        samples: int | None = None,
        num_top: int = 0,
        cfg_scale: float = 0.0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            samples: of the Monte-Carlo bound; None is the chain rule.
            num_top: alternatives of each token that are told too, of the chain rule.
            cfg_scale, seed: as of a reply.

        Raises RequestError for a `begin` behind the prompt.
        """
        if begin > len(ids):
            message = f"likelihood_from={begin} lies behind the prompt of {len(ids)} tokens"
            raise RequestError(400, message, param="likelihood_from")
        self._given, self._scored = ids[:begin], ids[begin:]
        self._block = network_block(engine.model)
        self._samples, self._seed = samples, seed
        self.forwards = 0
        self.tokens = [
            Token(token, engine.token_bytes[token], 0, None, None if place < begin else 0.0)
            for place, token in enumerate(ids)
        ]
        """The prompt's; those that were given have no probability."""
        length = len(self._scored)
        self._request = GenerateRequest(
            self._given,
            SamplingConfig(
                max(1, length),
                block_length=self._block or max(1, length),
                temperature=0.0,
                remasking="leftmost",
                cfg_scale=cfg_scale,
            ),
            seed=seed,
            end_ids=frozenset(),
            wants_trace=True,
            num_top=num_top,
            forced=self._scored,
        )

    def requests(self) -> Iterator[tuple[GenerateRequest, float]]:
        """What is to be run, and what its log-probabilities weigh."""
        if not self._scored:
            return
        if self._samples is None:
            yield self._request, 1.0
            return
        for masked in self._masks(self._samples):
            fixed: dict[int, int | str] = {
                place: token for place, token in enumerate(self._scored) if not masked[place]
            }
            sampling = replace(self._request.sampling, fixed=fixed or None)
            blocks = count_blocks(sampling, len(self._given), self._block)
            request = replace(self._request, sampling=replace(sampling, steps=blocks))
            yield request, len(self._scored) / int(masked.sum()) / self._samples

    def work(self, expect: Callable[[SamplingConfig, int], float]) -> float:
        """Token-forwards that it takes; `expect`: of a request with so many tokens that are given."""
        if self._samples is not None:
            return float(self._samples * (len(self._given) + len(self._scored)))
        return expect(self._request.sampling, len(self._given)) if self._scored else 0.0

    def add(self, tokens: Iterable[Token], begin: int, weight: float) -> None:
        """What one of the requests has written, from its token `begin` on."""
        for place, token in enumerate(tokens, start=len(self._given) + begin):
            if token.logprob is not None:
                value = (self.tokens[place].logprob or 0.0) + token.logprob * weight
                self.tokens[place] = replace(self.tokens[place], logprob=value, top=token.top)

    def _masks(self, samples: int) -> Iterator[Tensor]:
        """The masks (T,) that `llada.log_likelihood` draws with this seed."""
        generator = torch.Generator().manual_seed(self._seed)
        given, length = len(self._given), len(self._scored)
        counts = stratified_counts(torch.rand((), generator=generator) * length + 0.5, samples, length)
        is_scored = torch.arange(given + length) >= given
        for part in counts.split(16):
            rows = is_scored.expand(len(part), -1)
            yield from mask_exactly(rows, part, torch.rand(rows.shape, generator=generator))[:, given:]


async def score_prompts(engine: DenoiseEngine, scores: Sequence[Score]) -> AsyncGenerator[Started, None]:
    """Run them; yields Started, with the tokens of all, when the first has left the queue. Leaving early cancels the rest. Raises what
    `DenoiseEngine.stream` does."""
    waiting = ((score, *work) for score in scores for work in score.requests())
    is_first = True
    # In a thread: drawing and laying out masks of a long prompt must not hold up the streams of the others.
    while wave := await asyncio.to_thread(lambda: list(islice(waiting, _WAVE))):
        read = [0] * len(wave)
        async with contextlib.aclosing(engine.stream(*(request for _, request, _ in wave))) as events:
            async for event in events:
                score, _, weight = wave[event.index]
                if isinstance(event, Text):
                    score.add(event.tokens, read[event.index], weight)
                    read[event.index] += len(event.tokens)
                elif isinstance(event, Finished):
                    score.forwards += event.nfe
                elif isinstance(event, Started) and is_first:
                    is_first = False
                    yield Started(0, sum(len(score.tokens) for score in scores))
