"""Blocks that are compiled one by one: in one piece each, with what is recomputed in them, and learning the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from llada.model.rotary import rotary_table
from llada.training.parallel import Recomputed, build_parallel


@pytest.mark.parametrize("recomputed", get_args(Recomputed))
def test_a_block_is_one_graph(make_config: Callable, recomputed: Recomputed) -> None:
    config, _ = make_config()
    model = build_parallel(config, torch.device("cpu"), torch.float32, recomputed=recomputed)
    model.init_weights(0)
    block = model.layers[0]
    x = torch.randn(2, 16, config.d_model, generator=torch.Generator().manual_seed(0), requires_grad=True)
    cos, sin = (table[:, None] for table in rotary_table(torch.arange(16), config.head_dim, 1e4))
    compiled = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(run(x, cos, sin).square().sum(), x) for run in (block.forward, compiled)]
    torch.testing.assert_close(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", get_args(Recomputed))
def test_compiled_blocks_learn_the_same(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path, recomputed: Recomputed
) -> None:
    """Rows cut to random lengths among them."""
    knobs = {"activation_checkpointing": recomputed, "random_length": 0.4, "micro_batch_rows": 4}
    plain = run_here(make_config(**knobs), pretrain_folder, tmp_path / "plain")
    compiled = run_here(make_config(**knobs, compile=True), pretrain_folder, tmp_path / "compiled")
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
