"""The switch `compiled`: what is linear in a network's tokens becomes a few large kernels instead of many small ones.

That is what a layer does before its attention and behind it, and the head: what packed.py runs on tokens laid end to end.
Attention stays as it is, as its shapes are those of the rows. All layers and all numbers of tokens share one compilation of
each function. On a GPU the layers' functions of few tokens are recorded besides (graphs.py).
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.compilation import for_many_kinds
from llada.model.predict import Model, takes_packed_rows
from llada.model.transformer import Block, Transformer
from llada.sampling.graphs import Recorded, Recorder, capture_on
from llada.settings import require

# Tokens that a function is compiled with: dimensions of equal length would be taken for the same, and no other of a
# network's is this one.
_EXAMPLE = 97
_LOCK = threading.Lock()  # who finds a network compiled, finds all of it
F = TypeVar("F", bound=Callable[..., Any])


class _Recordings(dict[str, Recorded]):
    """By the function's name. A copy of the network has none: they read the weights of this one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Recordings, ()


class CompiledBlock(Block):
    """A layer whose functions are compiled where nothing is to be differentiated and tokens lie end to end."""

    recordings: _Recordings

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not _is_packed(x):
            return super().project(x, cos, sin)
        return self._run("project", x, cos, sin)

    def mix(self, x: Tensor, attended: Tensor) -> Tensor:
        if not _is_packed(x):
            return super().mix(x, attended)
        return self._run("mix", x, attended)

    def _run(self, name: str, *tokens: Tensor) -> Any:
        if (recorded := self.recordings.get(name)) is not None:
            return recorded(*tokens)
        return self.run_compiled(name, *tokens)

    def run_compiled(self, name: str, *tokens: Tensor) -> Any:
        if len(tokens[0]) < 2:  # would be compiled anew
            return getattr(Block, name)(self, *tokens)
        # In one layout, as another would be compiled anew.
        return _compiled(getattr(Block, name))(self, *(x.contiguous() for x in tokens))


class CompiledTransformer(Transformer):
    """The same of the head."""

    def _head(self, x: Tensor) -> Tensor:
        if not _is_packed(x) or len(x) < 2:
            return super()._head(x)
        return _compiled(Transformer._head)(self, x.contiguous())


def compile_network(model: Model) -> None:
    """Compile a network of ours for the sampler, in place, as `nn.Module.compile` does: now, so that no request waits for it,
    and for as long as the network lives. It takes some seconds to a minute; of a compiled network, no time.

    Logits are the same up to rounding. Training, whole rows (B, L) and what is saved are not touched. A network that is
    moved or converted afterwards is compiled again as it runs.

    Raises UserError for a plain function, and where torch finds no compiler.
    """
    # What is recorded must be of use outside of an inference mode that is on here.
    with _LOCK, torch.inference_mode(False):
        if type(model) is not CompiledTransformer:
            _compile(model)


def _compile(model: Model) -> None:
    require(
        type(model) is Transformer
        and takes_packed_rows(model)
        and all(type(layer) is Block for layer in model.layers),
        "compiled: it needs a network of ours, whose layers it compiles; leave it out for a plain function and a network with a "
        "shift",
    )
    network = cast(Transformer, model)
    _check_compiler(network.embed.weight.device)
    _become(network, CompiledTransformer, CompiledBlock)
    try:
        _warm(network)
    except BaseException:
        _become(network, Transformer, Block)
        raise


def _become(network: Transformer, kind: type[Transformer], layer_kind: type[Block]) -> None:
    network.__class__ = kind
    for layer in network.layers:
        layer.__dict__["recordings"] = _Recordings()
        layer.__class__ = layer_kind


@torch.no_grad()
def _warm(network: Transformer) -> None:
    """Compile, and record."""
    config, weight = network.config, network.embed.weight

    def example(*shape: int, dtype: torch.dtype = weight.dtype) -> Tensor:
        """For any number of tokens. Each has memory of its own: a view would be compiled for views."""
        tokens = torch.zeros(_EXAMPLE, *shape, dtype=dtype, device=weight.device)
        torch._dynamo.mark_dynamic(tokens, 0)
        return tokens

    x = example(config.d_model)
    turn = [example(1, config.head_dim, dtype=torch.float32) for _ in ("cos", "sin")]
    examples = {"project": (x, *turn), "mix": (x, example(config.num_heads, config.head_dim))}
    network._head(x)
    recorder = Recorder(capture_on(weight.device)) if weight.is_cuda else None
    for layer in network.layers:
        block = cast(CompiledBlock, layer)
        for name, shown in examples.items():
            block._run(name, *shown)
            if recorder is not None:
                run = functools.partial(CompiledBlock.run_compiled, block, name)
                block.recordings[name] = Recorded(recorder, name, block, run, shown)


def _is_packed(x: Tensor) -> bool:
    return x.dim() == 2 and not torch.is_grad_enabled()


@functools.cache
def _compiled(function: F) -> F:
    """Once for all networks: torch keeps what it has compiled by function, weights being arguments to it."""
    return cast(F, torch.compile(function, **for_many_kinds()))


def _check_compiler(device: torch.device) -> None:
    """Raise UserError where torch could not compile for the device."""
    remedy = "on this machine; install it, or leave compiled out"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        require(has_triton(), f"compiled: torch finds no triton that knows {device} {remedy}")
        has_c = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        require(bool(has_c), f"compiled: triton finds no C compiler (gcc, clang or $CC) {remedy}")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(f"compiled: torch finds no C++ compiler (g++ or $CXX) {remedy}") from None
