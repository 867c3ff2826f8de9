"""What is compiled meets more kinds of inputs than torch expects, and stays compiled."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llada.model import attention
from llada.model.transformer import ModelConfig, rotary_table
from llada.sampling import compiled
from llada.training.parallel import build_parallel

# Each is a kind of its own.
DTYPES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64".split()  # noqa: SIM905


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Those that torch.compile makes; they run as they are."""
    torch._dynamo.reset()
    made: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Callable:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    yield made
    torch._dynamo.reset()  # which shapes vary is remembered


@pytest.mark.parametrize("compile_once", [attention._compile, compiled._compiled])
def test_a_function_is_compiled_for_more_than_eight_kinds_of_inputs(
    compile_once: Any, graphs: list[Any]
) -> None:
    double = compile_once.__wrapped__(lambda x: x + x)
    for name in DTYPES:
        double(torch.ones(2, dtype=getattr(torch, name)))
    assert len(graphs) == len(DTYPES)


def test_so_is_a_block(graphs: list[Any]) -> None:
    """With `fullgraph`, which raises at the ninth otherwise."""
    config = ModelConfig(vocab_size=8, d_model=8, num_layers=1, num_heads=2, ffn_dim=8)
    model = build_parallel(config, torch.device("cpu"), torch.float32, compiled=True)
    model.init_weights(0)
    for learns, rows, length, dtype in itertools.product(
        (True, False), (1, 2), (1, 4), (torch.float32, torch.float64)
    ):
        cos, sin = (
            table[:, None].to(dtype) for table in rotary_table(torch.arange(length), config.head_dim, 1e4)
        )
        with torch.set_grad_enabled(learns):
            model.layers[0](torch.ones(rows, length, 8), cos, sin)
        if len(graphs) == 9:
            break
    assert len(graphs) == 9
