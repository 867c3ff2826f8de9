"""Many requests on one network: `DenoiseEngine` walks all their replies together, on one canvas (batch.py).

One background thread runs one forward at a time and looks after each whether a text can grow, has ended or is no longer
wanted; replies join and leave between forwards. Every one has noise of its own and sees nothing of the others, so that the
same seed gives the same text whatever else runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator

import torch
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.model.predict import Model, check_weights, network_block, resolve_mask_id
from llada.sampling.batch import Batch, Group, Progress, Run, cache_bytes
from llada.sampling.cache import find_cache
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.compiled import compile_network
from llada.sampling.events import Draft, Event, Finished, Started, Text, Token
from llada.sampling.forward import check_invariance
from llada.sampling.generate import held_back
from llada.sampling.mailbox import Letter, Mailbox
from llada.sampling.prefixes import PrefixStore
from llada.sampling.reply import Reply
from llada.sampling.request import GenerateRequest, check_request
from llada.sampling.sampler import advance
from llada.sampling.stats import EngineStats, Forecast
from llada.sampling.text import spell_fixed, text_ends, turn_end
from llada.sampling.text_stream import pieces
from llada.sampling.token_bytes import TokenBytes
from llada.sampling.trace import log_prob_of

_log = logging.getLogger(__name__)
_FAILURES_IN_A_ROW = 3  # a broken accelerator fails every request; one bad request must not restart a server


class _Run(Run):
    def __init__(
        self, index: int, request: GenerateRequest, reply: Reply, stream: _Stream, cache_bytes: int
    ) -> None:
        super().__init__(reply, stream)
        self.index, self.request, self.stream, self.cache_bytes = index, request, stream, cache_bytes
        self.num_given = len(request.prompt) + len(request.suffix)
        self.block, self.block_began = 0, 0.0
        """The one that it works on, and since when (`time.monotonic`)."""


class _Stream(Group):
    """The replies that are asked for together. `is_cancelled` may be set anywhere, the rest is the engine's thread's."""

    def __init__(self, priority: int, pace_s: float) -> None:
        super().__init__(priority)
        self.waiting: deque[_Run] = deque()
        self.num_unfinished = 0
        """Replies that are wanted and not complete."""
        self.mailbox = Mailbox(pace_s)
        self.is_cancelled = False


class DenoiseEngine:
    """Serves requests on `model`. Thread-safe; every `stream` may belong to another event loop."""

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_concurrent: int = 8,
        max_tokens: int = 2048,
        max_cache_bytes: int = 1 << 32,
        batch_invariant: bool = False,
        compiled: bool = False,
    ) -> None:
        """
        Args:
            max_concurrent: streams that are worked on; further ones wait, the higher priority first, then in the order of
                their arrival. Each has at least one reply on the canvas, and more while there are fewer than this in all.
            max_tokens: that one forward is fed; at least one row is in it in any case.
            max_cache_bytes: keys and values of the rows on the canvas; a row that would take more waits, and those behind it
                with it, so that small ones do not keep out a large one. One that takes more than all of it is alone.
            batch_invariant: rounding does not depend on what else runs either (`forward`).
            compiled: the network is compiled first, unless it is already, and stays so (`compile_network`).
        """
        for name, value in (
            ("max_concurrent", max_concurrent),
            ("max_tokens", max_tokens),
            ("max_cache_bytes", max_cache_bytes),
        ):
            if value < 1:
                raise UserError(f"engine: {name} must be at least 1, not {value}")
        check_invariance(model, batch_invariant)
        if compiled:
            compile_network(model)
        self.model, self.tokenizer, self.max_concurrent = model, tokenizer, max_concurrent
        self.batch_invariant = batch_invariant
        self.max_cache_bytes = max_cache_bytes
        self.mask_id = resolve_mask_id(model, None)
        ends = text_ends(model, tokenizer)
        self.eos_id: int | None = ends[0] if ends else None
        self.end_ids = frozenset(ends)
        self.token_bytes = TokenBytes(tokenizer)
        self._turn_end = turn_end(tokenizer)  # looked up in the whole vocabulary
        self._changed = threading.Condition()
        self._waiting: deque[_Stream] = deque()
        self._running: list[_Stream] = []
        self._batch = Batch(max_tokens=max_tokens)
        self._prefixes = PrefixStore()
        self._stats, self.forecast = EngineStats(rows_most=max_concurrent), Forecast()
        self._written_to: dict[Mailbox, None] = {}
        """Whose readers are to be woken, in order; some of them later."""
        self._damage: str | None = None
        try:
            check_weights(model)
        except FloatingPointError as error:  # every reply's failure, and not that of starting
            self._damage = str(error)
        self._is_closing = False
        self._failures = 0
        self._forward_began: float | None = None
        self._thread = threading.Thread(target=self._work, name="denoise-engine", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_unfinished(self) -> int:
        """Replies that are asked for and not complete, of all streams."""
        with self._changed:
            return sum(stream.num_unfinished for stream in [*self._running, *self._waiting])

    def stats(self) -> EngineStats:
        """As things stand."""
        with self._changed:
            streams = [*self._running, *self._waiting]
            runs = [_own(run) for run in list(self._batch.runs)]
            left = sum(max(self._expect(run) - run.fed, run.num_given) for run in runs)
            left += sum(self._expect(run) for stream in streams for run in list(stream.waiting))
            return dataclasses.replace(
                self._stats,
                blocks=list(self._stats.blocks),
                replies=sum(stream.num_unfinished for stream in streams),
                rows_now=len(runs),
                cache_bytes=sum(run.cache_bytes for run in runs),
                work_left=left,
            )

    def _expect(self, run: _Run) -> float:
        return self.forecast.expect(run.request.sampling, run.num_given)

    async def stream(self, *requests: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Run the requests; yields their events as they come, the last of each a Finished. Leaving early cancels them.

        Raises UserError for a request that cannot be run (before it is begun), RuntimeError when the engine is
        closed, and what the network raised.
        """
        async with contextlib.aclosing(self.batches(*requests)) as batches:
            async for events in batches:
                for event in events:
                    yield event

    async def batches(
        self, *requests: GenerateRequest, pace_s: float = 0.0
    ) -> AsyncGenerator[list[Event], None]:
        """As `stream`; what has come of a forward, or of several for a slow reader, is one list. After the first text, one
        that holds nothing but text comes no sooner than `pace_s` after another."""
        stream = _Stream(max((request.priority for request in requests), default=0), pace_s)
        runs = []
        for i, request in enumerate(requests):
            runs.append(self._build_run(i, request, stream))
            # A check takes milliseconds where texts are long: what others have to say goes out between two.
            await asyncio.sleep(0)
        if not runs:
            return
        stream.waiting.extend(runs)
        stream.num_unfinished = unfinished = len(runs)
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the engine is closed")
            self._waiting.append(stream)
            self._changed.notify()
        try:
            while unfinished:
                events: list[Event] = []
                for letter in await stream.mailbox.get():
                    if isinstance(letter, BaseException):
                        if events:
                            yield events
                        raise letter
                    unfinished -= isinstance(letter, Finished)
                    events.append(letter)
                yield events
        finally:
            stream.is_cancelled = True
            with self._changed:
                if stream in self._waiting:
                    self._waiting.remove(stream)

    def check(self, *, stall_timeout_s: float = 600.0) -> None:
        """Raises RuntimeError when nothing can be expected any more: the process should be replaced."""
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended")
        if self._failures >= _FAILURES_IN_A_ROW:
            raise RuntimeError(f"the last {self._failures} requests failed in the network")
        began = self._forward_began
        if began is not None and time.monotonic() - began > stall_timeout_s:
            raise RuntimeError(f"a forward has been running for more than {stall_timeout_s:g} s")

    def check_request(self, request: GenerateRequest) -> None:
        """Raises UserError for a request that cannot be run."""
        check_request(request, self.model, self.tokenizer, self.mask_id)

    def close(self) -> None:
        """Stop after the current forward; unfinished requests get a RuntimeError. May be called twice."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    # --- Admission ----------------------------------------------------------------------------------------------------

    def _build_run(self, index: int, request: GenerateRequest, stream: _Stream) -> _Run:
        self.check_request(request)
        ends = self.end_ids if request.end_ids is None else request.end_ids
        reply = Reply(
            self.tokenizer,
            start=len(request.prompt),
            length=request.sampling.gen_length,
            mask_id=self.mask_id,
            end_ids=ends,
            stop=request.stop,
            fill_id=self.eos_id,
        )
        num_given = len(request.prompt) + len(request.suffix)
        needed = cache_bytes(self.model, request.sampling, num_given + request.sampling.gen_length)
        return _Run(index, request, reply, stream, needed)

    def _begin(self, run: _Run) -> Canvas:
        """Lay a request out as a canvas of one row."""
        request = run.request
        config = spell_fixed(self.tokenizer, request.sampling)
        canvas = prompt_canvas(
            torch.tensor([request.prompt], dtype=torch.int64),
            config,
            mask_id=self.mask_id,
            eos_id=sorted(run.reply.end_ids, key=lambda token: token != self.eos_id),
            **held_back(config, sorted(self.end_ids), self._turn_end),
            suffix=request.suffix,
            seed=request.seed,
            network_block=network_block(self.model),
            is_traced=request.wants_trace or request.wants_drafts,
            num_top=request.num_top,
            forced=request.forced,
            slots=request.slots,
        )
        run.block_began = time.monotonic()
        self._write(run.stream, Started(run.index, run.num_given))
        return canvas

    def _admit(self) -> None:
        """Streams from the queue, then their replies onto the canvas: one of each, and more while there is room."""
        with self._changed:
            while self._waiting and len(self._running) < self.max_concurrent:
                first = max(self._waiting, key=lambda stream: stream.priority)
                self._waiting.remove(first)
                self._running.append(first)
        in_use = sum(_own(run).cache_bytes for run in self._batch.runs)
        runs: list[Run] = []
        canvases = []
        begun: Counter[_Stream] = Counter()

        def next_stream() -> _Stream | None:
            """The one with the fewest replies on the canvas, of those that have one waiting and may have it begun."""
            has_room = len(self._batch.runs) + len(runs) < self.max_concurrent
            count = {s: s.on_canvas + begun[s] for s in self._running if s.waiting and not s.is_cancelled}
            open_ones = [s for s in count if has_room or not count[s]]
            return min(open_ones, key=lambda s: (count[s], -s.priority), default=None)

        while (stream := next_stream()) is not None:
            needed = stream.waiting[0].cache_bytes
            if (runs or self._batch.runs) and in_use + needed > self.max_cache_bytes:
                break
            run = stream.waiting.popleft()
            try:
                canvases.append(self._begin(run))
            except Exception as error:  # says nothing about the network
                self._fail(run, error)
                continue
            begun[stream] += 1
            runs.append(run)
            in_use += needed
        self._batch.add(runs, canvases)
        self._wake_readers()  # a forward may take long

    # --- The thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while True:
                if self._waiting or not self._running or self._is_closing:
                    with self._changed:
                        while not (self._waiting or self._running or self._is_closing):
                            self._changed.wait()
                        if self._is_closing:
                            return
                self._turn()
        finally:
            with self._changed:
                self._is_closing = True
                for stream in [*self._running, *self._waiting]:
                    self._write(stream, RuntimeError("the engine was closed before the reply was complete"))
                self._wake_readers()
                self._running.clear()
                self._waiting.clear()
            self._batch.keep(lambda run: False)

    def _turn(self) -> None:
        """One forward, and what it made readable."""
        self._let_go()
        if self._waiting or any(stream.waiting for stream in self._running):
            self._admit()
        for progress in self._batch.progress(self._advance()):
            run = _own(progress.run)
            try:
                self._read(run, progress.tokens, progress.final_until, progress.forwards)
            except Exception as error:  # says nothing about the network
                self._fail(run, error)
            self._count(run, progress)
        self._wake_readers()
        self._let_go()

    def _advance(self) -> list[int]:
        """The rows that one forward has brought on."""
        step, canvas = self._batch.plan(), self._batch.canvas
        if step is None or canvas is None:
            return []
        self._forward_began = began = time.monotonic()
        try:
            if self._damage is not None:
                for row in step.rows.tolist():
                    self._fail_in_network(row, FloatingPointError(self._damage))
                return []
            brought_on = advance(
                self.model,
                canvas,
                step,
                self._prefixes,
                batch_invariant=self.batch_invariant,
                fail=self._fail_in_network,
            )
            self._stats.forwards += 1
            self._stats.rows += len(brought_on)
            self._stats.seconds += time.monotonic() - began
            return brought_on
        finally:
            self._forward_began = None

    def _count(self, run: _Run, progress: Progress) -> None:
        """What a turn did for a reply, in the statistics."""
        stats, sampling, is_over = self._stats, run.request.sampling, run.reply.reason is not None
        stats.tokens += progress.fed
        cache = find_cache(sampling)
        if cache is not None and cache.refresh is None:
            whole = (run.num_given + sampling.gen_length) * (1 + (sampling.cfg_scale != 0))
            stats.cache_refreshes += progress.fed >= whole
        if is_over or progress.block != run.block:
            now = time.monotonic()
            stats.add_block(now - run.block_began)
            run.block, run.block_began = progress.block, now
        if is_over:
            self.forecast.learn(sampling, run.num_given, run.fed)

    def _let_go(self) -> None:
        """Take the replies off the canvas that have ended or are no longer wanted, and forget streams without any."""
        for stream in self._running:
            if stream.is_cancelled:
                stream.waiting.clear()
                stream.num_unfinished = 0
        for run in map(_own, self._batch.runs):
            if run.stream.is_cancelled and run.reply.reason is None:
                self._stats.cancelled_replies += 1
                self._stats.cancelled_tokens += run.fed
        self._batch.keep(lambda run: run.reply.reason is None and not _own(run).stream.is_cancelled)
        if any(not (stream.waiting or stream.on_canvas) for stream in self._running):
            with self._changed:
                self._running = [stream for stream in self._running if stream.waiting or stream.on_canvas]

    def _fail(self, run: Run, error: Exception) -> None:
        """One request's failure is not the others'. What those say who are asked for with it, is of no interest."""
        stream = _own(run).stream
        if not stream.is_cancelled:
            if not isinstance(error, UserError):  # which is told to whoever asked
                _log.error("a request failed", exc_info=error)
            self._write(stream, error)
            stream.is_cancelled = True

    def _fail_in_network(self, row: int, error: Exception) -> None:
        self._forward_began = time.monotonic()  # the next row's
        run = self._batch.runs[row]
        if not _own(run).stream.is_cancelled and not isinstance(error, UserError):
            self._failures += 1
        self._fail(run, error)

    def _read(self, run: _Run, tokens: torch.Tensor, final_until: int, forwards: int) -> None:
        """Send what has become readable of a reply, and its end."""
        if run.stream.is_cancelled:
            return
        reply, request = run.reply, run.request
        before = reply.num_committed
        text = reply.read(tokens, final_until)
        new = self._tokens(run, before, reply.num_committed) if request.wants_trace else ()
        if text or new:
            self._write(run.stream, Text(run.index, text, new, reply.num_committed))
        if request.wants_drafts:
            self._write(run.stream, self._draft(run, forwards))
        if reply.reason is not None:
            self._failures = 0
            run.stream.num_unfinished -= 1
            count = reply.num_committed
            has_end = request.wants_trace and reply.has_end
            end = self._tokens(run, count, count + 1)[0] if has_end else None
            self._write(run.stream, Finished(run.index, reply.reason, run.num_given, count, forwards, end))

    def _tokens(self, run: _Run, begin: int, end: int) -> tuple[Token, ...]:
        """The tokens [begin, end) of a reply that is traced."""
        start = len(run.request.prompt)
        trace = self._batch.trace(run, start + begin, start + end)
        found = []
        for place, token in enumerate(run.reply.ids[begin:end]):
            sure, top = trace.confidences[place], dict(trace.tops[place])
            # The same number in both places: clients compare them.
            log_prob = None if sure is None else top.get(token, log_prob_of(sure))
            spelled = tuple((self.token_bytes[other], value) for other, value in top.items())
            block, step = trace.blocks[place], trace.steps[place]
            is_special = token in self.token_bytes.special
            found.append(Token(token, self.token_bytes[token], block, step, log_prob, spelled, is_special))
        return tuple(found)

    def _draft(self, run: _Run, forwards: int) -> Draft:
        start, drawn = len(run.request.prompt), run.reply.draw()
        trace = self._batch.trace(run, start, start + len(drawn))
        begin, end = (max(0, column - start) for column in trace.block)
        block = begin, min(end, run.request.sampling.gen_length)
        texts = pieces(self.tokenizer, drawn)
        return Draft(run.index, forwards, block, texts, trace.steps, trace.confidences)

    def _write(self, stream: _Stream, letter: Letter) -> None:
        stream.mailbox.put(letter)
        self._written_to[stream.mailbox] = None

    def _wake_readers(self) -> None:
        due = [mailbox for mailbox in self._written_to if mailbox.is_due()]
        Mailbox.wake(due)
        for mailbox in due:
            del self._written_to[mailbox]


def _own(run: Run) -> _Run:
    assert isinstance(run, _Run)
    return run
