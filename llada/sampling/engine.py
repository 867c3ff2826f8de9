"""Many requests on one network: `DenoiseEngine` puts their replies on one canvas and walks all of them together.

One background thread runs one forward at a time, of as many rows as `max_tokens` lets in, whatever their lengths, settings
and progress, and looks after each forward whether a text can grow, has ended or is no longer wanted. Rows join and leave
between forwards. Where not all rows fit, turns go round between streams, not between the replies that one of them asks
for: who asks for 32 gets no more of the network than who asks for one. Every row has noise of its own and sees nothing of
the others, so that the same seed gives the same text whatever else runs.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.model.predict import Model, check_tokens, resolve_mask_id, takes_packed_rows
from llada.sampling.cache import KeyValues
from llada.sampling.canvas import Canvas, Step, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.events import Event, Finished, Started, Text
from llada.sampling.forward import columns_to_feed
from llada.sampling.generate import held_back
from llada.sampling.mailbox import Mailbox
from llada.sampling.reply import Reply
from llada.sampling.sampler import advance, plan
from llada.sampling.text import spell_fixed, text_ends, turn_end

_log = logging.getLogger(__name__)
_FAILURES_IN_A_ROW = 3  # a broken accelerator fails every request; one bad request must not restart a server


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """A reply of `sampling.gen_length` masks at the most, between a prompt and (for infilling) a suffix."""

    prompt: Sequence[int]
    sampling: SamplingConfig
    suffix: Sequence[int] = ()
    seed: int | None = None
    stop: Sequence[str] = ()
    end_ids: frozenset[int] | None = None
    """What ends the text; None: the model's and tokenizer's EOS, and <|eot_id|>."""
    wants_canvas: bool = False
    """After every forward, also the whole reply with its masks."""
    priority: int = 0
    """The higher go first, into the engine and into a forward that does not hold all rows; equals take turns."""


class _Run:
    """One reply on its way: touched by the engine's thread only."""

    def __init__(self, index: int, request: GenerateRequest, reply: Reply) -> None:
        self.index, self.request, self.reply = index, request, reply
        self.served = 0
        """Tokens fed to the network so far."""


class _Stream:
    """The replies that are asked for together. `is_cancelled` may be set anywhere, the rest is the engine's thread's."""

    def __init__(self, runs: Sequence[_Run], mailbox: Mailbox) -> None:
        self.waiting, self.mailbox = deque(runs), mailbox
        self.on_canvas = 0
        self.priority = max(run.request.priority for run in runs)
        self.served = 0
        """Tokens fed to the network for it, and for those that had been served least when it came."""
        self.is_cancelled = False

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + self.on_canvas


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
    ) -> None:
        """
        Args:
            max_concurrent: streams that are worked on; further ones wait, the higher priority first, then in the order of
                their arrival. Each has at least one reply on the canvas, and more while there are fewer than this in all.
            max_tokens: that one forward is fed; at least one row is in it in any case.
            max_cache_bytes: keys and values of the rows on the canvas; rows that would take more wait.
        """
        for name, value in (
            ("max_concurrent", max_concurrent),
            ("max_tokens", max_tokens),
            ("max_cache_bytes", max_cache_bytes),
        ):
            if value < 1:
                raise UserError(f"engine: {name} must be at least 1, not {value}")
        config = getattr(model, "config", None)
        self.model, self.tokenizer, self.max_concurrent = model, tokenizer, max_concurrent
        self.max_tokens, self.max_cache_bytes = max_tokens, max_cache_bytes
        self.max_length: int | None = getattr(config, "max_length", None)
        self.mask_id = resolve_mask_id(model, None)
        ends = text_ends(model, tokenizer)
        self.eos_id: int | None = ends[0] if ends else None
        self.end_ids = frozenset(ends)
        self._changed = threading.Condition()
        self._waiting: deque[_Stream] = deque()
        self._running: list[_Stream] = []
        # The rows of the canvas: whose they are.
        self._canvas: Canvas | None = None
        self._rows: list[tuple[_Stream, _Run]] = []
        self._is_closing = False
        self._damaged_weight = _not_finite(model)
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

    async def stream(self, *requests: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Run the requests; yields their events as they come, the last of each a Finished. Leaving early cancels them.

        Raises UserError for a request that cannot be run (before any is begun), RuntimeError when the engine is
        closed, and what the network raised.
        """
        mailbox = Mailbox()
        runs = [self._build_run(i, request) for i, request in enumerate(requests)]
        if not runs:
            return
        stream = _Stream(runs, mailbox)
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the engine is closed")
            self._waiting.append(stream)
            self._changed.notify()
        unfinished = len(runs)
        try:
            while unfinished:
                for event in await mailbox.get():
                    if isinstance(event, BaseException):
                        raise event
                    unfinished -= isinstance(event, Finished)
                    yield event
        finally:
            stream.is_cancelled = True

    def check(self, *, stall_timeout_s: float = 600.0) -> None:
        """Raises RuntimeError when nothing can be expected any more: the process should be replaced."""
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended")
        if self._failures >= _FAILURES_IN_A_ROW:
            raise RuntimeError(f"the last {self._failures} requests failed in the network")
        began = self._forward_began
        if began is not None and time.monotonic() - began > stall_timeout_s:
            raise RuntimeError(f"a forward has been running for more than {stall_timeout_s:g} s")

    def close(self) -> None:
        """Stop after the current forward; unfinished requests get a RuntimeError. May be called twice."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    # --- Admission ----------------------------------------------------------------------------------------------------

    def _build_run(self, index: int, request: GenerateRequest) -> _Run:
        length = len(request.prompt) + request.sampling.gen_length + len(request.suffix)
        if self.max_length is not None and length > self.max_length:
            raise UserError(f"a canvas of {length} tokens exceeds the context length of {self.max_length}")
        if self.mask_id in request.prompt or self.mask_id in request.suffix:
            raise UserError(f"prompt and suffix must not hold the mask token (id {self.mask_id})")
        fixed = spell_fixed(self.tokenizer, request.sampling).fixed or {}
        if self.mask_id in fixed.values():
            raise UserError(f"sampling: fixed must not hold the mask token (id {self.mask_id})")
        for name, given in {
            "prompt": request.prompt,
            "suffix": request.suffix,
            "sampling: fixed": fixed.values(),
        }.items():
            check_tokens(name, self.model, torch.tensor([*given], dtype=torch.int64))
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
        return _Run(index, request, reply)

    def _begin(self, stream: _Stream, run: _Run) -> Canvas:
        """Lay a request out as a canvas of one row."""
        request = run.request
        stream.mailbox.put(Started(run.index))
        config = spell_fixed(self.tokenizer, request.sampling)
        return prompt_canvas(
            torch.tensor([request.prompt], dtype=torch.int64),
            config,
            mask_id=self.mask_id,
            eos_id=sorted(run.reply.end_ids, key=lambda token: token != self.eos_id),
            **held_back(config, sorted(self.end_ids), turn_end(self.tokenizer)),
            suffix=request.suffix,
            seed=request.seed,
        )

    def _admit(self) -> None:
        """Streams from the queue, then their replies onto the canvas: one of each, and more while there is room."""
        while self._waiting and len(self._running) < self.max_concurrent:
            first = max(self._waiting, key=lambda stream: stream.priority)
            self._waiting.remove(first)
            first.served = min((other.served for other in self._running), default=0)
            self._running.append(first)
        in_use = sum(self._cache_bytes(run.request) for _, run in self._rows)
        laid_out = [] if self._canvas is None else [self._canvas]
        while (stream := self._next_to_lay_out()) is not None:
            needed = self._cache_bytes(stream.waiting[0].request)
            if self._rows and in_use + needed > self.max_cache_bytes:
                break
            run = stream.waiting.popleft()
            try:
                laid_out.append(self._begin(stream, run))
            except Exception as error:  # says nothing about the network
                self._fail(stream, error)
                continue
            stream.on_canvas += 1
            self._rows.append((stream, run))
            in_use += needed
        if len(laid_out) > 1 or self._canvas is None:
            self._canvas = Canvas.join(laid_out) if laid_out else None

    def _next_to_lay_out(self) -> _Stream | None:
        """The stream with the fewest replies on the canvas, of those that have one waiting and may have it begun."""
        has_room = len(self._rows) < self.max_concurrent
        open_ones = [s for s in self._running if s.waiting and (has_room or not s.on_canvas)]
        return min(open_ones, key=lambda stream: (stream.on_canvas, -stream.priority), default=None)

    def _cache_bytes(self, request: GenerateRequest) -> int:
        if request.sampling.cache is None or not takes_packed_rows(self.model):
            return 0
        length = len(request.prompt) + request.sampling.gen_length + len(request.suffix)
        copies = 2 if request.sampling.cfg_scale else 1
        return copies * KeyValues.num_bytes(self.model.config, length, self.model.embed.weight.itemsize)

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
                    stream.mailbox.put(RuntimeError("the engine was closed before the reply was complete"))
                self._running.clear()
                self._waiting.clear()

    def _turn(self) -> None:
        """One forward, of the rows whose turn it is."""
        self._let_go()
        self._admit()
        canvas = self._canvas
        if canvas is not None:
            step = plan(canvas)
            if step is None or len(step.rows) < len(self._rows):
                raise RuntimeError("a row has no mask left, and its reply has not ended")
            for row in self._advance(canvas, self._whose_turn(canvas, step)):
                self._read(canvas, row)
        self._let_go()

    def _let_go(self) -> None:
        """Take the rows off the canvas whose reply has ended or is no longer wanted, and forget streams without any."""
        for stream in self._running:
            if stream.is_cancelled:
                stream.waiting.clear()
        kept = [
            row
            for row, (stream, run) in enumerate(self._rows)
            if run.reply.reason is None and not stream.is_cancelled
        ]
        if len(kept) < len(self._rows):
            for stream in self._running:
                stream.on_canvas = 0
            self._rows = [self._rows[row] for row in kept]
            for stream, _ in self._rows:
                stream.on_canvas += 1
            assert self._canvas is not None
            self._canvas = self._canvas.take(kept) if kept else None
        if any(not stream.num_unfinished for stream in self._running):
            with self._changed:
                self._running = [stream for stream in self._running if stream.num_unfinished]

    def _fail(self, stream: _Stream, error: Exception) -> None:
        """One request's failure is not the others'."""
        _log.error("a request failed", exc_info=error)
        stream.mailbox.put(error)
        stream.is_cancelled = True
        stream.waiting.clear()

    def _whose_turn(self, canvas: Canvas, step: Step) -> Step:
        """Those rows of a step that may be fed at once: the higher priority first, then one row of each stream, that which
        was served least first, then another of each."""
        fed = [columns.end - columns.begin for _, columns in columns_to_feed(canvas, step)]
        if sum(fed) > self.max_tokens:
            by_service = sorted(range(len(fed)), key=lambda row: self._rows[row][1].served)
            place: dict[int, int] = {}  # of a row among those of its stream
            seen: Counter[_Stream] = Counter()
            for row in by_service:
                place[row] = seen[self._rows[row][0]]
                seen[self._rows[row][0]] += 1
            order = sorted(
                by_service,
                key=lambda row: (-self._rows[row][0].priority, place[row], self._rows[row][0].served),
            )
            room = self.max_tokens
            chosen: list[int] = []
            for row in order:
                if chosen and fed[row] > room:
                    break
                chosen.append(row)
                room -= fed[row]
            rows = torch.tensor(sorted(chosen))
            step = Step(step.rows[rows], step.where[rows])
        for row in step.rows.tolist():
            for served in self._rows[row]:
                served.served += fed[row]
        return step

    def _advance(self, canvas: Canvas, step: Step) -> list[int]:
        """Run the forward; the rows that it brought on. Where it fails, each row is tried alone."""
        self._forward_began = time.monotonic()
        try:
            if self._damaged_weight is not None:
                raise FloatingPointError(
                    f"the network's weight {self._damaged_weight} holds NaN or infinite values"
                )
            advance(self.model, canvas, step)
            return step.rows.tolist()
        except Exception as error:
            if len(step.rows) == 1:
                self._failures += 1
                self._fail(self._rows[int(step.rows[0])][0], error)
                return []
        finally:
            self._forward_began = None
        alone = (Step(step.rows[i : i + 1], step.where[i : i + 1]) for i in range(len(step.rows)))
        return [row for one in alone for row in self._advance(canvas, one)]

    def _read(self, canvas: Canvas, row: int) -> None:
        """Send what has become readable of a row, and its end."""
        stream, run = self._rows[row]
        if stream.is_cancelled:
            return
        reply = run.reply
        text = reply.read(canvas.tokens[row])
        if text or run.request.wants_canvas:
            stream.mailbox.put(Text(run.index, text, reply.draw() if run.request.wants_canvas else None))
        if reply.reason is not None:
            self._failures = 0
            prompt_tokens = len(run.request.prompt) + len(run.request.suffix)
            nfe = int(canvas.forwards[row])
            stream.mailbox.put(Finished(run.index, reply.reason, prompt_tokens, reply.num_committed, nfe))


def _not_finite(model: Model) -> str | None:
    """The name of a weight that holds NaN or infinite values. Not all of them reach the logits: torch's attention on a CPU
    makes zeros of scores that are no numbers."""
    parameters: Iterable[tuple[str, torch.Tensor]] = getattr(model, "named_parameters", tuple)()
    return next((name for name, value in parameters if not value.isfinite().all()), None)
