"""What an engine says of its work: counted by hand on small replies, of those that end and those that are given up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from llada.model.transformer import Transformer
from llada.sampling.config import SamplingConfig
from llada.sampling.engine import DenoiseEngine
from llada.sampling.events import Text
from llada.sampling.request import GenerateRequest
from llada.sampling.stats import BLOCK_SECONDS, EngineStats, Forecast, most_token_forwards
from llada.tokenizer import train_tokenizer

SAMPLING = SamplingConfig(gen_length=12, steps=None, block_length=4, temperature=1.0)
PROMPT = [7] * 8
TOKENIZER = train_tokenizer(["One, two, three. Go on!"] * 5, 300)


@pytest.fixture
def engine(make_model: Callable[..., Transformer]) -> Iterator[DenoiseEngine]:
    model = make_model(
        vocab_size=len(TOKENIZER),
        max_length=1024,
        mask_token_id=TOKENIZER.mask_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    engine = DenoiseEngine(model, TOKENIZER, max_concurrent=4)
    yield engine
    engine.close()


def run(engine: DenoiseEngine, *requests: GenerateRequest, until: int | None = None) -> EngineStats:
    """The statistics after the end of the requests, or when `until` texts have come, whose reader then leaves."""

    async def read() -> EngineStats:
        texts = 0
        async with contextlib.aclosing(engine.stream(*requests)) as events:
            async for event in events:
                texts += isinstance(event, Text)
                if texts == until:
                    return engine.stats()
        while engine.num_running:
            await asyncio.sleep(0.01)
        return engine.stats()

    return asyncio.run(read())


def ask(seed: int = 0, **settings: object) -> GenerateRequest:
    # Nothing ends a reply before its length.
    sampling = SamplingConfig(**{**vars(SAMPLING), **settings})  # type: ignore[arg-type]
    return GenerateRequest(PROMPT, sampling, seed=seed, end_ids=frozenset())


def test_two_replies_share_their_forwards(engine: DenoiseEngine) -> None:
    stats = run(engine, ask(0), ask(1))
    assert (stats.rows, stats.forwards) == (24, 12)
    assert stats.tokens == 24 * 20
    assert sum(stats.blocks) == 6  # three of four tokens each
    assert 0 < stats.block_seconds < 2 * stats.seconds + 60
    assert (stats.replies, stats.rows_now, stats.work_left, stats.cache_bytes) == (0, 0, 0, 0)
    assert (stats.cancelled_replies, stats.cache_refreshes, stats.rows_most) == (0, 0, 4)


def test_a_row_with_a_cache_is_fed_whole_once_a_block_or_as_often_as_is_said(engine: DenoiseEngine) -> None:
    assert run(engine, ask(cache="dual")).cache_refreshes == 3
    assert run(engine, ask(cache="dual", refresh_every=2)).cache_refreshes == 3 + 6
    assert run(engine, ask(cache="dual", cfg_scale=1.0)).cache_refreshes == 9 + 3


def test_what_is_given_up_was_for_nothing(engine: DenoiseEngine) -> None:
    endless = [ask(seed, gen_length=900) for seed in range(2)]
    most = 2 * 900 * 908
    midway = run(engine, *endless, until=4)
    assert midway.replies == 2
    assert 0 < midway.work_left < most
    while engine.num_running:
        time.sleep(0.01)
    after = engine.stats()
    assert (after.cancelled_replies, after.replies, after.work_left) == (2, 0, 0)
    assert 0 < after.cancelled_tokens == after.tokens < most


def test_the_most_a_reply_can_take() -> None:
    assert most_token_forwards(SAMPLING, 8) == 12 * 20
    assert most_token_forwards(SamplingConfig(gen_length=12, steps=5), 0) == 5 * 12
    assert most_token_forwards(SamplingConfig(gen_length=12, steps=5, cfg_scale=1.0), 0) == 2 * 5 * 12


def test_replies_that_take_less_are_expected_to() -> None:
    forecast = Forecast()
    assert forecast.expect(SAMPLING, 8) == 240
    for _ in range(100):
        forecast.learn(SAMPLING, 8, 60)
    assert forecast.expect(SAMPLING, 8) == pytest.approx(60, rel=0.01)
    forecast.learn(SAMPLING, 8, 10_000)  # a canvas that grew: never more than all
    assert forecast.share < 1


def test_the_engine_learns_from_what_ends(engine: DenoiseEngine) -> None:
    run(engine, ask(threshold=0.0))  # all of a block at once: 3 forwards instead of 12
    assert engine.forecast.share == pytest.approx(1 - 0.1 * 0.75)
    run(engine, ask(gen_length=900), until=2)
    assert engine.forecast.share == pytest.approx(1 - 0.1 * 0.75)  # what is given up teaches nothing


def test_a_latency_falls_between_two_bounds() -> None:
    stats = EngineStats()
    for seconds in (0.001, BLOCK_SECONDS[0], 0.02, 1e9):
        stats.add_block(seconds)
    assert (stats.blocks[:2], stats.blocks[-1], sum(stats.blocks)) == ([2, 1], 1, 4)
