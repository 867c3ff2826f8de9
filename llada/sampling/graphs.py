"""Functions of few tokens, recorded: all their kernels are launched as one, where launching costs more than they do.

A CUDA graph repeats the same kernels on the same memory. So tokens are copied to where they were when it was recorded, as
many as it was recorded for or fewer, and what it made of them is copied away at once. All recordings of a network run in
the same memory, one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Tokens that a function is recorded for, in ascending order. With more, a layer of some 10⁸ weights computes for longer than
# its launches take.
SIZES = (64, 128, 256)

Step = Callable[[], object]
"""Reads and writes memory that stays where it is."""
Capture = Callable[[Step], Step]
"""Of a step one that repeats it."""


class Recording(NamedTuple):
    """A function of at most so many tokens as its buffers hold."""

    inputs: Sequence[Tensor]
    """(size, …) each."""
    output: Tensor
    """(size, W): what the function returns, side by side."""
    shapes: Sequence[torch.Size]
    """Of each result for one token; together they have W numbers."""
    replay: Step

    def run(self, tokens: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of tokens (t, …), t ≤ size. What is left from others behind them changes nothing: a token sees no other here."""
        count = len(tokens[0])
        for buffer, given in zip(self.inputs, tokens, strict=True):
            buffer[:count].copy_(given)
        self.replay()
        # The next run writes over the output, while the caller may want to join several.
        parts = self.output[:count].clone().split([shape.numel() for shape in self.shapes], dim=1)
        return tuple(part.view(count, *shape) for part, shape in zip(parts, self.shapes, strict=True))


class Recorder:
    """What the recordings of one network share. Safe from several threads that launch on one stream."""

    def __init__(self, capture: Capture) -> None:
        self.capture, self.lock = capture, threading.Lock()
        self._buffers: dict[tuple[str, int], tuple[list[Tensor], Tensor]] = {}

    def record(
        self, name: str, function: Callable[..., Any], size: int, example: Sequence[Tensor]
    ) -> Recording:
        """`function` for `size` tokens, of the kind that `example` (…, …) shows. The layers' functions of one name take
        and return the same shapes, and have the same buffers."""
        shown = _results(function(*example))
        shapes = [result.shape[1:] for result in shown]
        if (name, size) not in self._buffers:
            width = sum(shape.numel() for shape in shapes)
            inputs = [x.new_zeros(size, *x.shape[1:]) for x in example]
            self._buffers[name, size] = inputs, shown[0].new_empty(size, width)
        inputs, output = self._buffers[name, size]

        def step() -> None:
            torch.cat([result.flatten(1) for result in _results(function(*inputs))], dim=1, out=output)

        with self.lock:
            return Recording(inputs, output, shapes, self.capture(step))


class Recorded:
    """A function of tokens that a module has, recorded for each of SIZES; of more tokens, and where it is no longer what was
    recorded, the function itself."""

    def __init__(
        self,
        recorder: Recorder,
        name: str,
        module: nn.Module,
        function: Callable[..., Any],
        example: Sequence[Tensor],
    ) -> None:
        self.function, self._lock = function, recorder.lock
        self._holders = [part for part in module.modules() if part._parameters]
        self._sizes = [(size, recorder.record(name, function, size, example)) for size in SIZES]
        self._dtypes = [x.dtype for x in example]
        self._place = self._find()

    def __call__(self, *tokens: Tensor) -> Any:
        recording = self._choose(tokens)
        if recording is None:
            return self.function(*tokens)
        with self._lock:
            results = recording.run(tokens)
        return results if len(results) > 1 else results[0]

    def _choose(self, tokens: Sequence[Tensor]) -> Recording | None:
        count = len(tokens[0])
        if count > SIZES[-1] or [x.dtype for x in tokens] != self._dtypes or self._find() != self._place:
            return None
        return next(recording for size, recording in self._sizes if count <= size)

    def _find(self) -> list[int]:
        """Where the weights are, and what orders the work on them: a recording knows both by their addresses alone."""
        weights = [
            weight for part in self._holders for weight in part._parameters.values() if weight is not None
        ]
        found = [weight.data_ptr() for weight in weights]
        if weights[0].is_cuda:
            found.append(torch.cuda.current_stream(weights[0].device).cuda_stream)
        return found


def capture_on(device: torch.device) -> Capture:
    """Steps on this CUDA device become graphs, all in one pool of memory: what they make in between is of no use to others."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        with torch.cuda.device(device):
            caller = torch.cuda.current_stream()
            # What is loaded, chosen or set aside when a kernel runs first cannot be recorded.
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                step()
            caller.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating memory.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                step()
        return graph.replay

    return capture


def _results(of: Any) -> tuple[Tensor, ...]:
    return of if isinstance(of, tuple) else (of,)
