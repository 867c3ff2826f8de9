"""Many requests on one network: `DenoiseEngine` walks each request's canvas with `sampler.denoise`, in turns.

One background thread runs one forward at a time, round-robin over the admitted requests, and looks after each forward
whether the text can grow, end or is no longer wanted. Every request has a canvas and a random generator of its own, so
that the same seed gives the same text whatever else runs. Forwards of several requests are not batched; `_turn` is the
place for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llada.diffusion.likelihood import Model, resolve_mask_id
from llada.sampling.sampler import Canvas, SamplingConfig, build_generators, denoise, device_of
from llada.sampling.text import end_ids
from llada.sampling.text_stream import TextStream

_log = logging.getLogger(__name__)
_FAILURES_IN_A_ROW = 3  # a broken accelerator fails every request; one bad request must not restart a server

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """A reply of `sampling.gen_length` masks at the most, between a prompt and (for infilling) a suffix."""

    prompt: Sequence[int]
    sampling: SamplingConfig
    suffix: Sequence[int] = ()
    seed: int | None = None
    stop: Sequence[str] = ()
    end_ids: frozenset[int] | None = None  # None: the model's and tokenizer's EOS, and <|eot_id|>
    wants_canvas: bool = False  # after every forward, also the whole reply with its masks


@dataclasses.dataclass(frozen=True)
class Delta:
    """Text that was committed. The first one, empty, says that the request has left the queue."""

    index: int  # which of the requests of `stream`
    text: str = ""
    canvas: tuple[str | int, ...] | None = None  # texts, and between them numbers of masks


@dataclasses.dataclass(frozen=True)
class Completion:
    """The end of a reply."""

    index: int
    finish_reason: FinishReason  # "stop": an end token or stop string; "length": the canvas is full
    prompt_tokens: int  # suffix included
    completion_tokens: int  # up to the end token (not counted) or the stop string (counted)
    nfe: int  # forwards of the network

    @property
    def tokens_per_forward(self) -> float:
        return self.completion_tokens / self.nfe if self.nfe else 0.0


class _Mailbox:
    """From the engine's thread to one coroutine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._events: deque[Delta | Completion | BaseException] = deque()

    def put(self, event: Delta | Completion | BaseException) -> None:
        self._events.append(event)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._filled.set)

    async def get(self) -> list[Delta | Completion | BaseException]:
        """Everything that has arrived; deltas of a request that pile up are joined, for readers slower than us."""
        await self._filled.wait()
        self._filled.clear()
        arrived: list[Delta | Completion | BaseException] = []
        while self._events:
            event = self._events.popleft()
            last = arrived[-1] if arrived else None
            if isinstance(event, Delta) and isinstance(last, Delta) and event.index == last.index:
                arrived[-1] = Delta(event.index, last.text + event.text, event.canvas or last.canvas)
            else:
                arrived.append(event)
        return arrived


class _Run:
    """One request on its way: touched by the engine's thread only, except for `is_cancelled`."""

    def __init__(
        self, index: int, request: GenerateRequest, end_ids: frozenset[int], mailbox: _Mailbox
    ) -> None:
        self.index, self.request, self.end_ids, self.mailbox = index, request, end_ids, mailbox
        self.is_cancelled = False
        self.canvas: Canvas | None = None
        self.forwards: Iterator[Canvas] = iter(())
        self.text: TextStream | None = None
        self.num_committed = 0  # tokens of the reply that were turned into text


class DenoiseEngine:
    """Serves requests on `model`. Thread-safe; every `stream` may belong to another event loop."""

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_concurrent: int = 8,
        max_length: int | None = None,
    ) -> None:
        """
        Args:
            max_concurrent: canvases walked at a time; further requests wait in the order of their arrival.
            max_length: tokens of a canvas at the most; None takes the model's `config.max_length`.
        """
        if max_concurrent < 1:
            raise ValueError(f"engine: max_concurrent must be at least 1, not {max_concurrent}")
        config = getattr(model, "config", None)
        self.model, self.tokenizer, self.max_concurrent = model, tokenizer, max_concurrent
        self.max_length: int | None = max_length or getattr(config, "max_length", None)
        self.mask_id = resolve_mask_id(model, None)
        self.eos_id: int | None = getattr(config, "eos_token_id", None)
        if self.eos_id is None:
            self.eos_id = tokenizer.eos_token_id
        self.end_ids = frozenset(end_ids(tokenizer) | ({self.eos_id} - {None}))
        self._device = device_of(model) or torch.device("cpu")
        self._changed = threading.Condition()
        self._waiting: deque[_Run] = deque()
        self._running: list[_Run] = []
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

    async def stream(self, *requests: GenerateRequest) -> AsyncGenerator[Delta | Completion, None]:
        """Run the requests; yields their deltas as they come and one completion each. Leaving early cancels them.

        Raises ValueError for a request that cannot be run (before any is begun), RuntimeError when the engine is
        closed, and what the network raised.
        """
        mailbox = _Mailbox()
        runs = [self._build_run(i, request, mailbox) for i, request in enumerate(requests)]
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the engine is closed")
            self._waiting.extend(runs)
            self._changed.notify()
        unfinished = len(runs)
        try:
            while unfinished:
                for event in await mailbox.get():
                    if isinstance(event, BaseException):
                        raise event
                    unfinished -= isinstance(event, Completion)
                    yield event
        finally:
            for run in runs:
                run.is_cancelled = True

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

    def _build_run(self, index: int, request: GenerateRequest, mailbox: _Mailbox) -> _Run:
        length = len(request.prompt) + request.sampling.gen_length + len(request.suffix)
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"a canvas of {length} tokens exceeds the context length of {self.max_length}")
        if self.mask_id in request.prompt or self.mask_id in request.suffix:
            raise ValueError(f"prompt and suffix must not hold the mask token (id {self.mask_id})")
        run = _Run(index, request, self.end_ids if request.end_ids is None else request.end_ids, mailbox)
        run.text = TextStream(self.tokenizer, request.stop)
        return run

    def _begin(self, run: _Run) -> None:
        """Lay the request out as a canvas and start walking it."""
        request, sampling = run.request, run.request.sampling
        P, G = len(request.prompt), sampling.gen_length
        ids = [*request.prompt, *[self.mask_id] * G, *request.suffix]
        tokens = torch.tensor([ids], dtype=torch.int64, device=self._device)
        run.canvas = Canvas(
            tokens=tokens,
            mask_id=self.mask_id,
            prompt=tokens != self.mask_id,
            attention_mask=None,
            start=P,
            reveal_step=torch.full_like(tokens, -1),
            generators=build_generators(request.seed, 1, tokens.device),
        )
        if request.suffix:
            # The loop shares the steps out among all blocks right of the prompt, and those in the suffix need none:
            # ask for as many more, so that the masked blocks get exactly `sampling.steps`.
            masked, blocks = (-(-n // sampling.block_length) for n in (G, G + len(request.suffix)))
            steps = sampling.steps // masked * blocks + sampling.steps % masked
            sampling = dataclasses.replace(sampling, steps=max(1, steps))
        eos_id = self.eos_id if self.eos_id in run.end_ids else None
        run.forwards = denoise(self.model, run.canvas, sampling, eos_id=eos_id)
        run.mailbox.put(Delta(run.index))

    # --- The thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._waiting or self._running or self._is_closing):
                        self._changed.wait()
                    if self._is_closing:
                        return
                    while self._waiting and len(self._running) < self.max_concurrent:
                        self._running.append(self._waiting.popleft())
                self._turn()
        finally:
            with self._changed:
                self._is_closing = True
                for run in [*self._running, *self._waiting]:
                    run.mailbox.put(RuntimeError("the engine was closed before the reply was complete"))
                self._running.clear()
                self._waiting.clear()

    def _turn(self) -> None:
        """One forward of every admitted request."""
        for run in list(self._running):
            if self._is_closing:
                return
            if not run.is_cancelled:
                self._forward_began = time.monotonic()
                try:
                    ended = self._step(run)
                except Exception as error:  # one request's failure is not the others'
                    _log.exception("a request failed in the network")
                    self._failures += 1
                    run.mailbox.put(error)
                    ended = True
                finally:
                    self._forward_began = None
                if not ended:
                    continue
            self._running.remove(run)

    def _step(self, run: _Run) -> bool:
        """One forward of a request, and what it made readable. True when the request has ended."""
        if run.canvas is None:
            self._begin(run)
        canvas, text = run.canvas, run.text
        assert canvas is not None
        assert text is not None
        walked = next(run.forwards, None)
        P, G = len(run.request.prompt), run.request.sampling.gen_length
        reply = canvas.tokens[0, P : P + G]
        ids = self._close_reply(reply, run.end_ids)
        shown = ""
        reason: FinishReason | None = None
        while reason is None and run.num_committed < G and ids[run.num_committed] != self.mask_id:
            token = ids[run.num_committed]
            if token in run.end_ids:
                reason = "stop"
                break
            run.num_committed += 1
            shown += text.push(token)
            if text.is_stopped:
                reason = "stop"
        if reason is None and run.num_committed == G:
            reason = "length"
        if reason is not None:
            shown += text.finish()
            if text.is_stopped:  # the last character of a stop string may have been held back
                reason = "stop"
        if shown or run.request.wants_canvas:
            drawn = self._draw(ids, run.end_ids) if run.request.wants_canvas else None
            run.mailbox.put(Delta(run.index, shown, drawn))
        if reason is None and walked is None:
            raise RuntimeError("the denoising loop ended with masks left")
        if reason is None:
            return False
        self._failures = 0
        prompt_tokens = P + len(run.request.suffix)
        run.mailbox.put(Completion(run.index, reason, prompt_tokens, run.num_committed, canvas.nfe))
        return True

    def _close_reply(self, reply: Tensor, end_ids: frozenset[int]) -> list[int]:
        """The reply's ids. Behind its first end token every mask becomes EOS, as the loop itself does it for EOS:
        nothing there will be read, so no forward may be spent on it."""
        ids: list[int] = reply.tolist()
        first = next((i for i, token in enumerate(ids) if token in end_ids), None)
        if first is not None and self.mask_id in ids[first:]:
            rest = reply[first:]
            rest[rest == self.mask_id] = ids[first] if self.eos_id is None else self.eos_id
            ids = reply.tolist()
        return ids

    def _draw(self, ids: list[int], end_ids: frozenset[int]) -> tuple[str | int, ...]:
        """The reply up to its end token as texts and, between them, numbers of masks."""
        drawn: list[str | int] = []
        known: list[int] = []

        def flush() -> None:
            if text := self.tokenizer.backend_tokenizer.decode(known, skip_special_tokens=True):
                drawn.append(text)
            known.clear()

        for token in ids:
            if token in end_ids:
                break
            if token != self.mask_id:
                known.append(token)
                continue
            if known:
                flush()
            if drawn and isinstance(drawn[-1], int):
                drawn[-1] += 1
            else:
                drawn.append(1)
        if known:
            flush()
        return tuple(drawn)
