"""Many requests on one network: `DenoiseEngine` walks each one's canvases, in turns.

One background thread runs one forward at a time, round-robin over the admitted streams, and looks after each forward
whether the text can grow, end or is no longer wanted. Turns go round between streams, not between the replies that one
of them asks for (those are walked one after the other): who asks for 32 gets no more of the network than who asks for
one. Every reply has a canvas and noise of its own, so that the same seed gives the same text whatever else runs.
Forwards of several streams are not batched; `_turn` is the place for that: the canvases' plans are there, and
`sampler.commit` takes each one's logits from wherever they come.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.model.predict import Model, check_tokens, device_of, resolve_mask_id
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.config import SamplingConfig
from llada.sampling.events import Event, Finished, Started, Text
from llada.sampling.mailbox import Mailbox
from llada.sampling.reply import Reply
from llada.sampling.sampler import commit, forward, held_back, plan
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


class _Run:
    """One reply on its way: touched by the engine's thread only."""

    def __init__(self, index: int, request: GenerateRequest, reply: Reply, mailbox: Mailbox) -> None:
        self.index, self.request, self.reply, self.mailbox = index, request, reply, mailbox
        self.canvas: Canvas | None = None


class _Stream:
    """The replies that are asked for together, the first of `runs` being walked. `is_cancelled` may be set anywhere."""

    def __init__(self, runs: Sequence[_Run], mailbox: Mailbox) -> None:
        self.runs, self.mailbox = deque(runs), mailbox
        self.is_cancelled = False


class DenoiseEngine:
    """Serves requests on `model`. Thread-safe; every `stream` may belong to another event loop."""

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_concurrent: int = 8,
    ) -> None:
        """
        Args:
            max_concurrent: streams that take turns, one canvas each; further ones wait in the order of their arrival.
        """
        if max_concurrent < 1:
            raise UserError(f"engine: max_concurrent must be at least 1, not {max_concurrent}")
        config = getattr(model, "config", None)
        self.model, self.tokenizer, self.max_concurrent = model, tokenizer, max_concurrent
        self.max_length: int | None = getattr(config, "max_length", None)
        self.mask_id = resolve_mask_id(model, None)
        ends = text_ends(model, tokenizer)
        self.eos_id: int | None = ends[0] if ends else None
        self.end_ids = frozenset(ends)
        self._device = device_of(model) or torch.device("cpu")
        self._changed = threading.Condition()
        self._waiting: deque[_Stream] = deque()
        self._running: list[_Stream] = []
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
            return sum(len(stream.runs) for stream in [*self._running, *self._waiting])

    async def stream(self, *requests: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Run the requests; yields their events as they come, the last of each a Finished. Leaving early cancels them.

        Raises UserError for a request that cannot be run (before any is begun), RuntimeError when the engine is
        closed, and what the network raised.
        """
        mailbox = Mailbox()
        runs = [self._build_run(i, request, mailbox) for i, request in enumerate(requests)]
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

    def _build_run(self, index: int, request: GenerateRequest, mailbox: Mailbox) -> _Run:
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
        return _Run(index, request, reply, mailbox)

    def _begin(self, run: _Run) -> Canvas:
        """Lay the request out as a canvas."""
        request = run.request
        run.mailbox.put(Started(run.index))
        config = spell_fixed(self.tokenizer, request.sampling)
        return prompt_canvas(
            torch.tensor([request.prompt], dtype=torch.int64),
            config,
            mask_id=self.mask_id,
            eos_id=sorted(run.reply.end_ids, key=lambda token: token != self.eos_id),
            **held_back(config, sorted(self.end_ids), turn_end(self.tokenizer)),
            suffix=request.suffix,
            seed=request.seed,
            device=self._device,
        )

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
                for stream in [*self._running, *self._waiting]:
                    stream.mailbox.put(RuntimeError("the engine was closed before the reply was complete"))
                self._running.clear()
                self._waiting.clear()

    def _turn(self) -> None:
        """One forward of every admitted stream."""
        for stream in list(self._running):
            if self._is_closing:
                return
            if not stream.is_cancelled:
                run = stream.runs[0]
                self._forward_began = time.monotonic()
                try:
                    if self._advance(run):
                        stream.runs.popleft()
                except Exception as error:  # one request's failure is not the others'
                    _log.exception("a request failed")
                    # One that could not even be laid out says nothing about the network.
                    self._failures += run.canvas is not None
                    stream.mailbox.put(error)
                    stream.runs.clear()
                finally:
                    self._forward_began = None
                if stream.runs:
                    continue
            self._running.remove(stream)

    def _advance(self, run: _Run) -> bool:
        """One forward of a request, and what it made readable. True when the request has ended."""
        if run.canvas is None:
            run.canvas = self._begin(run)
        canvas, reply = run.canvas, run.reply
        if self._damaged_weight is not None:
            raise FloatingPointError(
                f"the network's weight {self._damaged_weight} holds NaN or infinite values"
            )
        step = plan(canvas)
        if step is None:
            raise RuntimeError("the canvas has no mask left, and its reply has not ended")
        commit(canvas, step, forward(self.model, canvas, step))
        text = reply.read(canvas.tokens[0])
        if text or run.request.wants_canvas:
            run.mailbox.put(Text(run.index, text, reply.draw() if run.request.wants_canvas else None))
        if reply.reason is None:
            return False
        self._failures = 0
        prompt_tokens = len(run.request.prompt) + len(run.request.suffix)
        run.mailbox.put(Finished(run.index, reply.reason, prompt_tokens, reply.num_committed, canvas.nfe))
        return True


def _not_finite(model: Model) -> str | None:
    """The name of a weight that holds NaN or infinite values. Not all of them reach the logits: torch's attention on a CPU
    makes zeros of scores that are no numbers."""
    parameters: Iterable[tuple[str, torch.Tensor]] = getattr(model, "named_parameters", tuple)()
    return next((name for name, value in parameters if not value.isfinite().all()), None)
