"""The engine: text grows by committed prefixes, ends where it should, and does not depend on the neighbours."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.batch import cache_bytes
from llada.sampling.candidates import Candidates
from llada.sampling.config import SamplingConfig
from llada.sampling.engine import DenoiseEngine
from llada.sampling.events import Draft, Event, Finished, Started, Text, Token
from llada.sampling.generate import generate
from llada.sampling.request import GenerateRequest
from llada.sampling.rules import RULES, Rule
from llada.tokenizer import END_OF_TURN, encode_texts, train_tokenizer

TEXTS = ["The cat sat on the mat. The dog ran off.", "Grüße aus Köln, 你好 🙂!", "One, two, three. Go on!"]
TOKENIZER = train_tokenizer(TEXTS * 5, 300)
EOS, MASK = TOKENIZER.eos_token_id, TOKENIZER.mask_token_id
EOT = TOKENIZER.convert_tokens_to_ids(END_OF_TURN)
SAMPLING = SamplingConfig(gen_length=24, steps=24, block_length=8, temperature=1.0)


def ids(text: str) -> list[int]:
    return encode_texts(TOKENIZER, [text])[0]


def build_model(seed: int = 0) -> Transformer:
    config = ModelConfig(300, 32, 2, 2, 64, max_length=256, mask_token_id=MASK, eos_token_id=EOS)
    model = Transformer(config)
    model.init_weights(seed)
    return model.eval()


class Script:
    """A network that is certain of one text: position P + i gets token i of `reply`, the earliest ones first.

    `order` "backward" makes it most certain of the last position.
    """

    def __init__(self, prompt: int, reply: list[int], order: str = "forward") -> None:
        self.config = dataclasses.make_dataclass("C", ["max_length", "mask_token_id", "eos_token_id"])(
            512, MASK, EOS
        )
        self.prompt, self.reply, self.order = prompt, reply, order
        self.forwards = 0

    def __call__(self, tokens: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        logits = torch.zeros(*tokens.shape, 300)
        for i in range(tokens.shape[1] - self.prompt):
            token = self.reply[i] if i < len(self.reply) else EOS
            logits[:, self.prompt + i, token] = 20 - 0.02 * (i if self.order == "forward" else -i)
        return logits


class Gated:
    """A network that waits to be let through."""

    def __init__(self, network: Transformer) -> None:
        self.network, self.config, self.open = network, network.config, threading.Event()

    def __call__(self, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        assert self.open.wait(60)
        return self.network(tokens, **inputs)


class Reply(NamedTuple):
    text: str
    pieces: list[Text]
    drafts: list[Draft]
    end: Finished

    @property
    def tokens(self) -> list[Token]:
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def steps(self) -> list[int | None]:
        return [token.step for token in self.tokens]


async def read(engine: DenoiseEngine, request: GenerateRequest) -> Reply:
    pieces: list[Text] = []
    drafts: list[Draft] = []
    events = engine.stream(request)
    assert await anext(events) == Started(0)
    async for event in events:
        if isinstance(event, Finished):
            return Reply("".join(piece.text for piece in pieces), pieces, drafts, event)
        if isinstance(event, Draft):
            drafts.append(event)
        else:
            assert isinstance(event, Text)
            pieces.append(event)
    raise AssertionError("no end")


@pytest.fixture(scope="module")
def engine() -> Iterator[DenoiseEngine]:
    engine = DenoiseEngine(build_model(), TOKENIZER, max_concurrent=3)
    yield engine
    engine.close()


@contextlib.contextmanager
def scripted(reply: list[int], prompt: str = "The", order: str = "forward") -> Iterator[DenoiseEngine]:
    engine = DenoiseEngine(Script(len(ids(prompt)), reply, order), TOKENIZER)
    try:
        yield engine
    finally:
        engine.close()


def test_is_what_generate_gives(engine: DenoiseEngine) -> None:
    request = GenerateRequest(ids("The cat"), SAMPLING, seed=5)
    reply = asyncio.run(read(engine, request))
    out = (
        generate(engine.model, [ids("The cat")], eos_id=EOS, seed=5, **dataclasses.asdict(SAMPLING))
        .sequences[0, len(ids("The cat")) :]
        .tolist()
    )
    kept = out[: min([out.index(e) for e in (EOS, EOT) if e in out], default=len(out))]
    assert reply.text == TOKENIZER.decode(kept, skip_special_tokens=True)
    assert reply.end.completion_tokens == len(kept)
    assert reply.end.prompt_tokens == len(ids("The cat"))


@pytest.mark.parametrize("rule", [{"remdm_cap": 0.5}, {"p2_eta": 2.0}], ids=str)
def test_what_may_become_a_mask_again_is_not_shown(engine: DenoiseEngine, rule: dict) -> None:
    """The text that is streamed is the text at the end, a block at a time."""
    sampling = dataclasses.replace(SAMPLING, **rule)
    request = GenerateRequest(ids("The cat"), sampling, seed=5, end_ids=frozenset())
    reply = asyncio.run(read(engine, request))
    out = generate(engine.model, [ids("The cat")], seed=5, **dataclasses.asdict(sampling))
    text = TOKENIZER.decode(out.sequences[0, len(ids("The cat")) :].tolist(), skip_special_tokens=True)
    assert reply.text == text


def test_the_same_seed_gives_the_same_text_in_company(engine: DenoiseEngine) -> None:
    requests = [GenerateRequest(ids("The dog"), SAMPLING, seed=seed) for seed in range(8)]

    async def together() -> list[Reply]:
        return list(await asyncio.gather(*(read(engine, request) for request in requests)))

    alone = [asyncio.run(read(engine, request)) for request in requests]
    assert [(r.text, r.end) for r in asyncio.run(together())] == [(r.text, r.end) for r in alone]
    assert len({r.text for r in alone}) > 4


def test_requests_take_turns() -> None:
    """A short request that comes second is finished long before a long one that came first."""

    network = Gated(build_model())
    engine = DenoiseEngine(network, TOKENIZER, max_concurrent=2)

    async def race() -> list[str]:
        ended: list[str] = []

        async def run(name: str, length: int) -> None:
            sampling = SamplingConfig(gen_length=length, steps=length, block_length=8)
            await read(engine, GenerateRequest(ids("One"), sampling, end_ids=frozenset()))
            ended.append(name)

        tasks = []
        for name, length in (("long", 120), ("short", 4)):
            tasks.append(asyncio.create_task(run(name, length)))
            while engine.num_unfinished < len(tasks):
                await asyncio.sleep(0.001)
        network.open.set()
        await asyncio.gather(*tasks)
        return ended

    assert asyncio.run(race()) == ["short", "long"]
    engine.close()


def test_turns_go_round_between_streams_not_between_their_replies() -> None:
    """Who asks for one short reply waits for as many forwards of the others as its own takes, however many they want."""
    model = build_model()

    class Watched:
        config = model.config

        def __init__(self) -> None:
            self.widths: list[int] = []

        def __call__(self, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
            self.widths.append(tokens.shape[1])
            return model(tokens, **inputs)

    watched = Watched()
    engine = DenoiseEngine(watched, TOKENIZER, max_concurrent=3)

    def asked(length: int) -> GenerateRequest:
        return GenerateRequest(ids("One"), SamplingConfig(length, length, 8), end_ids=frozenset())

    async def finished(*requests: GenerateRequest) -> list[int]:
        return [event.index async for event in engine.stream(*requests) if isinstance(event, Finished)]

    async def race() -> list[int]:
        many = asyncio.create_task(finished(*[asked(60)] * 16))
        while not watched.widths:
            await asyncio.sleep(0.001)
        await finished(asked(4))
        return await many

    assert asyncio.run(race()) == list(range(16))  # one after the other
    engine.close()
    is_short = [width == len(ids("One")) + 4 for width in watched.widths]
    first, last = is_short.index(True), len(is_short) - is_short[::-1].index(True)
    assert is_short[first:last] == [True, False, True, False, True, False, True]
    assert last < len(is_short) // 2  # long before the others are done


def test_one_stream_of_several_requests(engine: DenoiseEngine) -> None:
    requests = [GenerateRequest(ids("Go"), SAMPLING, seed=seed) for seed in (1, 2, 3, 4)]

    async def collect() -> tuple[list[str], list[Finished]]:
        texts, ends = [""] * 4, []
        async for event in engine.stream(*requests):
            if isinstance(event, Text):
                texts[event.index] += event.text
            elif isinstance(event, Finished):
                ends.append(event)
        return texts, ends

    texts, ends = asyncio.run(collect())
    assert texts == [asyncio.run(read(engine, request)).text for request in requests]
    assert sorted(end.index for end in ends) == [0, 1, 2, 3]


def test_text_grows_while_the_canvas_is_walked() -> None:
    wanted = "The cat sat on the mat. Grüße 🙂!"
    reply = ids(wanted)
    with scripted(reply) as engine:
        # 3 blocks, the last one short.
        sampling = SamplingConfig(gen_length=len(reply), steps=24, block_length=8)
        result = asyncio.run(read(engine, GenerateRequest(ids("The"), sampling)))
    assert result.text == wanted
    assert result.end == Finished(0, "length", len(ids("The")), len(reply), len(reply))
    assert "\ufffd" not in "".join(d.text for d in result.pieces)


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("end", [EOS, EOT])
def test_ends_at_the_first_end_token_and_stops_forwarding(end: int, order: str) -> None:
    """Blocks of 8 and the end at 4: nothing behind it is denoised, whichever end token it is."""
    reply = [*ids("One, two")[:4], end, *ids(" sat on the mat. The dog ran off.")]
    with scripted(reply, order=order) as engine:
        sampling = SamplingConfig(gen_length=32, steps=32, block_length=8)
        result = asyncio.run(read(engine, GenerateRequest(ids("The"), sampling)))
        forwards = engine.model.forwards
    assert result.text == TOKENIZER.decode(reply[:4])
    assert (result.end.reason, result.end.completion_tokens) == ("stop", 4)
    assert forwards == result.end.nfe <= 8


def test_an_immediate_end_is_an_empty_text() -> None:
    with scripted([EOT]) as engine:
        result = asyncio.run(read(engine, GenerateRequest(ids("The"), SAMPLING)))
    assert (result.text, result.end.completion_tokens, result.end.reason) == ("", 0, "stop")


@pytest.mark.parametrize("stop", [("mat",), ("zebra", "the ma"), ("the mat. T",), ("t on", "cat sat on")])
def test_stop_strings_cut_the_text_and_the_work(stop: tuple[str, ...]) -> None:
    wanted = " cat sat on the mat. The dog ran off. " + "Go on! " * 12
    reply = ids(wanted)
    with scripted(reply) as engine:
        sampling = SamplingConfig(gen_length=len(reply), steps=len(reply), block_length=4)
        result = asyncio.run(read(engine, GenerateRequest(ids("The"), sampling, stop=stop)))
    assert result.text == wanted[: min(wanted.find(s) for s in stop if s in wanted)]
    assert result.end.reason == "stop"
    assert result.end.nfe <= result.end.completion_tokens + 4 < len(reply)


def test_length_need_not_be_a_multiple_of_the_block() -> None:
    reply = ids("Go on! " * 9)[:13]
    with scripted(reply) as engine:
        sampling = SamplingConfig(gen_length=13, steps=16, block_length=8)
        result = asyncio.run(read(engine, GenerateRequest(ids("The"), sampling)))
    assert result.text == TOKENIZER.decode(reply)
    assert (result.end.completion_tokens, result.end.nfe, result.end.reason) == (13, 13, "length")


@pytest.mark.parametrize("steps", [5, 16, 24])
def test_infilling_leaves_the_prompt_and_suffix_alone(engine: DenoiseEngine, steps: int) -> None:
    prompt, suffix = ids("The cat"), ids(" off. One, two, three. Go on! Go on! Go on!")
    seen: list[torch.Tensor] = []

    class Watched:
        config = engine.model.config

        def __call__(self, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
            seen.append(tokens.clone())
            return engine.model(tokens, **inputs)

    watched = DenoiseEngine(Watched(), TOKENIZER)
    sampling = dataclasses.replace(SAMPLING, steps=steps)
    request = GenerateRequest(prompt, sampling, suffix=suffix, seed=1, end_ids=frozenset())
    result = asyncio.run(read(watched, request))
    watched.close()
    assert all(row[0, : len(prompt)].tolist() == prompt for row in seen)
    assert all(row[0, len(prompt) + 24 :].tolist() == suffix for row in seen)
    assert result.end.nfe == steps  # the suffix's blocks take none of them
    assert result.end.prompt_tokens == len(prompt) + len(suffix)
    assert result.end.completion_tokens == 24


def test_special_tokens_never_show() -> None:
    header = TOKENIZER.convert_tokens_to_ids("<|start_header_id|>")
    reply = [ids("The")[0], header, TOKENIZER.bos_token_id, *ids(" cat"), 299]
    with scripted(reply) as engine:
        sampling = SamplingConfig(gen_length=len(reply), steps=len(reply), block_length=4)
        result = asyncio.run(read(engine, GenerateRequest(ids("The"), sampling, wants_drafts=True)))
    for text in (result.text, "".join(text or "" for draft in result.drafts for text in draft.tokens)):
        assert "<|" not in text


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_a_draft_shows_what_is_masked(order: str) -> None:
    """After every forward, or, where they pile up, after the last of them; the block is where the next token comes."""
    wanted = ids("The cat sat, 你.")  # of a character of several tokens
    with scripted(wanted, order=order) as engine:
        sampling = SamplingConfig(len(wanted) + 5, None, 4, fixed={2: wanted[2]})
        result = asyncio.run(read(engine, GenerateRequest(ids("The"), sampling, wants_drafts=True)))
    last = result.drafts[-1]
    assert last.forwards == result.end.nfe
    assert "".join(text or "" for text in last.tokens) == result.text == "The cat sat, 你."
    assert None not in last.tokens
    assert len(last.tokens) == len(wanted)  # not what is behind the end
    for draft in result.drafts:
        shown = {place for place, text in enumerate(draft.tokens) if text is not None}
        come = {place for place, step in enumerate(last.steps) if step is None or step < draft.forwards}
        assert shown == {place for place in come if place < len(draft.tokens)}
        assert [draft.steps[place] for place in shown] == [last.steps[place] for place in shown]
        assert {place for place in shown if draft.confidences[place] is None} == shown & {2}
        newest = [place for place in shown if draft.steps[place] == draft.forwards - 1]
        assert all(draft.block[0] <= place < draft.block[1] for place in newest)
        assert draft.block[0] % 4 == 0


def test_leaving_a_stream_frees_its_place() -> None:
    engine = DenoiseEngine(build_model(), TOKENIZER, max_concurrent=1)
    long = GenerateRequest([], SamplingConfig(256, 256, 32), end_ids=frozenset())

    async def leave_then_ask() -> Reply:
        stream = engine.stream(long, long)
        await anext(stream)
        await stream.aclose()
        return await asyncio.wait_for(read(engine, GenerateRequest(ids("The"), SAMPLING, seed=1)), 60)

    assert asyncio.run(leave_then_ask()).end.nfe
    deadline = time.monotonic() + 60
    # The completion is sent a moment before the place is free.
    while engine.num_running or engine.num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    engine.close()


def test_who_leaves_the_queue_is_not_begun() -> None:
    """The only place is taken: a stream that is given up while it waits is gone at once."""
    engine = DenoiseEngine(build_model(), TOKENIZER, max_concurrent=1)
    long = GenerateRequest([], SamplingConfig(256, 256, 32), end_ids=frozenset())

    async def give_up() -> None:
        first = engine.stream(long)
        await anext(first)
        seen: list[object] = []

        async def second() -> None:
            async for event in engine.stream(long, long):
                seen.append(event)

        task = asyncio.create_task(second())
        while not engine.num_waiting:
            await asyncio.sleep(0)
        assert engine.num_unfinished == 3
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert (engine.num_running, engine.num_waiting, engine.num_unfinished) == (1, 0, 1)
        assert seen == []
        await first.aclose()

    asyncio.run(give_up())
    engine.close()


def test_small_requests_do_not_keep_out_a_large_one() -> None:
    """Memory for two small rows, or a large one: it is begun in its turn, when there is room, and those behind it wait."""
    small = GenerateRequest([5] * 8, SamplingConfig(8, cache="dual"), end_ids=frozenset())
    large = dataclasses.replace(small, sampling=SamplingConfig(24, cache="dual"))
    model = build_model()
    row = cache_bytes(model, small.sampling, 16)
    engine = DenoiseEngine(model, TOKENIZER, max_concurrent=16, max_cache_bytes=2 * row)
    begun: list[str] = []

    async def ask(name: str, request: GenerateRequest) -> None:
        async for event in engine.stream(request):
            if isinstance(event, Started):
                begun.append(name)

    async def race() -> None:
        tasks = []
        for name, request in [("small", small)] * 3 + [("large", large)] + [("small", small)] * 6:
            tasks.append(asyncio.create_task(ask(name, request)))
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*tasks), 60)

    asyncio.run(race())
    engine.close()
    assert begun == ["small"] * 3 + ["large"] + ["small"] * 6


def test_one_request_that_fails_says_nothing_about_the_network(caplog: pytest.LogCaptureFixture) -> None:
    """However many choices it has; nor does one whose own settings leave no token, which is no failure of ours to be logged."""
    model = build_model()

    class Fragile:
        config = model.config

        def __call__(self, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
            if bool((tokens == 77).any()):
                raise ValueError("the poisoned token")
            return model(tokens, **inputs)

    engine = DenoiseEngine(Fragile(), TOKENIZER, max_concurrent=4)

    async def ask(*requests: GenerateRequest) -> None:
        async for _ in engine.stream(*requests):
            pass

    with pytest.raises(ValueError, match="poisoned"):
        asyncio.run(ask(*[GenerateRequest([77], SAMPLING, seed=0)] * 4))
    engine.check()
    assert "a request failed" in caplog.text
    caplog.clear()
    nothing = dataclasses.replace(SAMPLING, forbidden={"*": tuple(range(300))})
    for _ in range(4):
        with pytest.raises(UserError, match="leave no token for position"):
            asyncio.run(ask(GenerateRequest([7], nothing, seed=0)))
    assert caplog.text == ""
    engine.check()
    engine.close()


def test_what_cannot_be_read_fails_its_request_alone(engine: DenoiseEngine) -> None:
    with pytest.raises(TypeError):
        asyncio.run(read(engine, GenerateRequest(ids("The"), SAMPLING, seed=1, stop=(3,))))  # type: ignore[arg-type]
    engine.check()
    assert asyncio.run(read(engine, GenerateRequest(ids("The"), SAMPLING, seed=1))).end.nfe


def test_the_trace_says_which_forward_each_token_came_from() -> None:
    wanted = ids("The cat sat.")
    with scripted(wanted, order="backward") as engine:
        sampling = SamplingConfig(len(wanted), len(wanted), len(wanted), fixed={1: wanted[1]})
        request = GenerateRequest(ids("The"), sampling, wants_trace=True)
        traced = asyncio.run(read(engine, request))
        untraced = asyncio.run(read(engine, dataclasses.replace(request, wants_trace=False)))
    assert traced.steps == [len(wanted) - 2, None, *range(len(wanted) - 3, -1, -1)]  # the last one first
    assert [token.id for token in traced.tokens] == wanted
    assert b"".join(token.raw for token in traced.tokens).decode() == traced.text == untraced.text
    assert {token.block for token in traced.tokens} == {0}
    assert untraced.tokens == []
    assert (traced.end.end, untraced.end.end) == (None, None)
    with scripted(wanted) as engine:
        ended = asyncio.run(read(engine, dataclasses.replace(request, sampling=SamplingConfig(20, None, 20))))
    assert ended.end.end is not None
    assert (ended.end.end.id, ended.end.end.is_special, len(ended.tokens)) == (EOS, True, len(wanted))


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_tells_how_sure_the_model_was(engine: DenoiseEngine, remasking: str) -> None:
    """The probability of each token on the canvas that its forward saw, laid out again from the reveal order."""
    sampling = SamplingConfig(12, 6, 12, remasking=remasking, fixed={2: ids(" cat")[0]})
    request = GenerateRequest(ids("The"), sampling, seed=3, end_ids=frozenset(), wants_trace=True)
    tokens = asyncio.run(read(engine, request)).tokens
    out = generate(engine.model, [ids("The")], seed=3, **dataclasses.asdict(sampling))
    final, begin = out.sequences[0], len(ids("The"))
    steps = torch.tensor([-1 if token.step is None else token.step for token in tokens])
    assert [token.id for token in tokens] == final[begin:].tolist()
    for place, token in enumerate(tokens):
        if token.step is None:
            assert token.logprob is None
            continue
        seen = final.clone()
        seen[begin:][steps >= token.step] = MASK
        logits = engine.model(seen[None])[0, begin + place].double()
        logits[MASK] = -torch.inf
        assert token.logprob == pytest.approx(logits.log_softmax(0)[token.id].item(), rel=1e-5)


def test_tells_what_else_was_likely(engine: DenoiseEngine) -> None:
    """The likeliest among what may stand there, the token itself with the same number; also where rows grow."""
    sampling = SamplingConfig(12, 6, 12, temperature=1.0, allowed={3: [7, 9]})
    request = GenerateRequest(ids("The"), sampling, seed=3, end_ids=frozenset(), wants_trace=True, num_top=4)
    growing = SamplingConfig(12, None, 12, initial_length=3, insert_below=0.9)
    beside = dataclasses.replace(request, sampling=growing, end_ids=None, num_top=2)

    async def both() -> dict[int, list[Token]]:
        tokens: dict[int, list[Token]] = {0: [], 1: []}
        async for event in engine.stream(request, beside):
            if isinstance(event, Text):
                tokens[event.index] += event.tokens
        return tokens

    found = asyncio.run(both())
    steps = torch.tensor([token.step for token in found[0]])
    final = torch.tensor(ids("The") + [token.id for token in found[0]])
    begin = len(ids("The"))
    for place, token in enumerate(found[0]):
        seen = final.clone()
        seen[begin:][steps >= token.step] = MASK
        logits = engine.model(seen[None])[0, begin + place].double()
        logits[MASK] = -torch.inf
        if place == 3:
            logits[[i for i in range(300) if i not in (7, 9)]] = -torch.inf
        values, which = logits.log_softmax(0).topk(4 if place != 3 else 2)
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), rel=1e-4)
        assert [spelled for spelled, _ in token.top] == [engine.token_bytes[i] for i in which.tolist()]
        own = dict(zip(which.tolist(), (value for _, value in token.top), strict=True))
        assert own.get(token.id, token.logprob) == token.logprob
    assert found[1]
    assert all(len(token.top) == 2 and token.top[0][1] >= (token.logprob or 0) for token in found[1])


@pytest.mark.parametrize("remasking", ["low_confidence", "leftmost"])
def test_writes_what_it_is_told(engine: DenoiseEngine, remasking: str) -> None:
    """And says how likely it was, in the order of the rule; an end of the text is a token like others."""
    told = [*ids("cat sat"), EOS, *ids("on")]
    sampling = SamplingConfig(len(told) + 2, None, 64, remasking=remasking)
    request = GenerateRequest(ids("The"), sampling, end_ids=frozenset(), wants_trace=True, forced=told)
    reply = asyncio.run(read(engine, request))
    assert [token.id for token in reply.tokens][: len(told)] == told
    assert (reply.steps == [*range(len(told) + 2)]) is (remasking == "leftmost")
    assert all(token.logprob is not None and token.logprob < 0 for token in reply.tokens)


def test_refuses_what_cannot_be_run_before_it_is_begun(engine: DenoiseEngine) -> None:
    for request, message in [
        (GenerateRequest([7, MASK], SAMPLING), "must not hold the mask token"),
        (GenerateRequest([7], SAMPLING, stop=("",)), "must not be empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            asyncio.run(anext(engine.stream(request)))


def test_a_request_that_cannot_be_laid_out_says_nothing_about_the_network() -> None:
    engine = DenoiseEngine(build_model(), TOKENIZER)
    for _ in range(4):
        with pytest.raises(UserError, match=r"a seed is an integer.*not 1\.5"):
            request = GenerateRequest(ids("The"), SAMPLING, seed=1.5)  # type: ignore[arg-type]
            asyncio.run(anext(engine.stream(request)))  # before it is begun
    engine.check()
    engine.close()


def test_a_row_is_traced_alike_in_any_company(engine: DenoiseEngine) -> None:
    """Beside rows that are not, that become longer, and that take tokens back."""
    kinds: list[dict[str, Any]] = [
        {},
        {"initial_length": 3, "eos_threshold": 0.5, "insert_below": 0.3, "steps": None, "temperature": 0.0},
        {"remdm_cap": 0.5},
        {"p2_eta": 1.0},
        {"threshold": 0.01, "confidence_eos_eot_inf": True},
    ]
    requests = [
        GenerateRequest(
            ids("The"), dataclasses.replace(SAMPLING, **knobs), seed=seed, wants_trace=seed % 3 > 0
        )
        for seed, knobs in enumerate(kinds * 3)
    ]

    async def read_all() -> tuple[dict[int, Finished], dict[int, list[Token]]]:
        ends: dict[int, Finished] = {}
        tokens: dict[int, list[Token]] = {index: [] for index in range(len(requests))}
        async for event in engine.stream(*requests):
            if isinstance(event, Finished):
                ends[event.index] = event
            elif isinstance(event, Text):
                tokens[event.index] += event.tokens
        return ends, tokens

    ends, together = asyncio.run(read_all())
    for index, request in enumerate(requests):
        alone = asyncio.run(read(engine, request))
        assert dataclasses.replace(alone.end, index=index) == ends[index]
        assert len(together[index]) == (ends[index].completion_tokens if request.wants_trace else 0)
        for token, same in zip(together[index], alone.tokens, strict=True):
            assert dataclasses.replace(token, logprob=None) == dataclasses.replace(same, logprob=None)
            assert token.logprob == pytest.approx(same.logprob, abs=1e-4)  # float32 logits
            assert (token.step is None) is (token.logprob is None)
            assert token.logprob is None or token.logprob <= 0


def test_a_rule_that_fails_costs_its_request_alone(
    engine: DenoiseEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin's, say: the rows beside it come on from the same forward."""

    def fail(candidates: Candidates) -> torch.Tensor:
        raise ValueError("no rule at all")

    monkeypatch.setitem(RULES._entries, "broken", Rule(fail))
    broken = GenerateRequest(ids("The"), dataclasses.replace(SAMPLING, remasking="broken"), seed=0)
    sound = GenerateRequest(ids("The cat"), SAMPLING, seed=5)

    async def read_both() -> list[Reply | BaseException]:
        return await asyncio.gather(read(engine, sound), read(engine, broken), return_exceptions=True)

    for _ in range(2):
        reply, error = asyncio.run(read_both())
        assert isinstance(error, ValueError)
        assert isinstance(reply, Reply)
        alone = asyncio.run(read(engine, sound))
        assert (reply.text, reply.end) == (alone.text, alone.end)  # a slow reader gets fewer, longer pieces


def test_a_failing_network_fails_the_request_and_then_the_check() -> None:
    model = build_model()

    class Fragile:
        config = model.config
        is_broken = True

        def __call__(self, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
            if self.is_broken:
                raise ValueError("the accelerator is gone")
            return model(tokens, **inputs)

    fragile = Fragile()
    engine = DenoiseEngine(fragile, TOKENIZER)
    request = GenerateRequest(ids("The"), SAMPLING, seed=0)
    for _ in range(3):
        engine.check()
        with pytest.raises(ValueError, match="accelerator"):
            asyncio.run(read(engine, request))
    with pytest.raises(RuntimeError, match="last 3 requests failed"):
        engine.check()
    fragile.is_broken = False
    asyncio.run(read(engine, request))
    engine.check()
    engine.close()
    with pytest.raises(RuntimeError, match="thread has ended"):
        engine.check()
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(read(engine, request))


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.q_proj.weight"])
def test_a_damaged_weight_is_a_failure_and_no_reply(name: str) -> None:
    model = build_model()
    model.get_parameter(name).data.view(-1)[3] = float("nan")
    engine = DenoiseEngine(model, TOKENIZER)
    for _ in range(3):
        engine.check()
        with pytest.raises(FloatingPointError, match=f"{name} holds NaN"):
            asyncio.run(read(engine, GenerateRequest(ids("The"), SAMPLING, seed=0)))
    with pytest.raises(RuntimeError, match="last 3 requests failed"):
        engine.check()
    engine.close()


@pytest.mark.parametrize("knobs", [{"remasking": "random"}, {"remasking": "ancestral"}, {}], ids=str)
def test_temperature_zero_without_a_seed_is_one_text(engine: DenoiseEngine, knobs: dict) -> None:
    sampling = dataclasses.replace(SAMPLING, temperature=0.0, **knobs)
    texts = {asyncio.run(read(engine, GenerateRequest(ids("The"), sampling))).text for _ in range(3)}
    assert len(texts) == 1


def test_steps_bound_a_parallel_rule(engine: DenoiseEngine) -> None:
    sampling = dataclasses.replace(SAMPLING, block_length=24, steps=2, threshold=1.0)
    assert asyncio.run(read(engine, GenerateRequest(ids("The"), sampling, seed=0))).end.nfe <= 2


def test_fixed_words_stand_in_the_reply(engine: DenoiseEngine) -> None:
    sampling = dataclasses.replace(SAMPLING, fixed={4: " dog", 20: " mat"})
    for seed in range(3):
        reply = asyncio.run(read(engine, GenerateRequest(ids("The"), sampling, seed=seed)))
        assert " dog" in reply.text
        assert " mat" in reply.text
        assert reply.end.completion_tokens > 20


def test_batch_invariant_reaches_every_product(watch_products: Callable[[Transformer], set[int]]) -> None:
    model = build_model()
    rows = watch_products(model)
    engine = DenoiseEngine(model, TOKENIZER, batch_invariant=True)
    asyncio.run(read(engine, GenerateRequest(ids("The cat"), SAMPLING, seed=5)))
    engine.close()
    assert rows == {64}
    with pytest.raises(UserError, match="batch_invariant needs a network of ours"):
        DenoiseEngine(Script(1, []), TOKENIZER, batch_invariant=True)


def test_a_paced_reply_is_the_same_in_few_messages() -> None:
    reply = ids("One, two, three")
    request = GenerateRequest(ids("Go"), SamplingConfig(gen_length=len(reply), steps=None, block_length=1))

    async def collect() -> list[list[Event]]:
        with scripted(reply) as engine:
            return [events async for events in engine.batches(request, pace_s=3600.0)]

    messages = asyncio.run(collect())
    assert len(messages) <= 3  # the beginning, the first text, and all that follows with the end
    assert messages[0][0] == Started(0)
    assert isinstance(messages[-1][-1], Finished)
    texts = [event.text for events in messages for event in events if isinstance(event, Text)]
    assert "".join(texts) == "One, two, three"


def test_others_are_heard_while_many_requests_are_checked(engine: DenoiseEngine) -> None:
    """A likelihood is some 32 requests at once; the checks of those with long prompts take a tenth of a second together."""
    requests = [GenerateRequest(ids("The cat"), SAMPLING) for _ in range(20)]
    with pytest.raises(UserError, match="room|context|length") as error:
        engine.check_request(bad := GenerateRequest([5] * 999, SAMPLING))

    async def count_turns() -> int:
        """Of another task before the last request is refused, and with it all, so that no forward has been waited for."""
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        with pytest.raises(UserError, match=re.escape(str(error.value))):
            await anext(engine.stream(*requests, bad))
        counting.cancel()
        return turns

    assert asyncio.run(count_turns()) >= len(requests)
