"""Runs whose speed is published, by which the planner's one free number is set and checked: the model FLOPs utilisation.

All are counted by `ModelConfig.training_flops_per_token`, attention included, against the dense bfloat16 peak: figures that
their authors give may count otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llada.hardware import ACCELERATORS
from llada.model.transformer import ModelConfig
from llada.presets import get_preset

FLOAT8_SPEED_UP = 1.28
"""Of a training step whose matrix products are in float8 (train.float8): torchtitan, 8,532 tokens/s instead of 6,667."""


@dataclass(frozen=True)
class PublishedRun:
    """A run and its speed."""

    name: str
    source: str
    model: ModelConfig
    row_length: int
    gpu: str
    tokens_per_second: float
    """Of one GPU."""
    float8: bool = False

    @property
    def mfu(self) -> float:
        """In float8 the arithmetic's speed-up is taken out of it."""
        flops = self.model.training_flops_per_token(self.row_length)
        speed_up = FLOAT8_SPEED_UP if self.float8 else 1.0
        return flops * self.tokens_per_second / ACCELERATORS[self.gpu].bf16_flops / speed_up

    def error(self, mfu: float) -> float:
        """Of planning it at this utilisation: GPU-hours planned / GPU-hours needed − 1."""
        return self.mfu / mfu - 1


_LLAMA_8B = ModelConfig(
    vocab_size=128_256, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14_336,
    max_length=8192, causal=True,
)  # fmt: skip
_DCLM_7B = ModelConfig(
    vocab_size=50_432, d_model=4096, num_layers=32, num_heads=32, ffn_dim=11_008, causal=True
)
_TORCHTITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"


def _torchtitan(name: str, tokens_per_second: float, *, float8: bool = False) -> PublishedRun:
    return PublishedRun(
        f"Llama 3.1 8B, {name}", _TORCHTITAN, _LLAMA_8B, 8192, "h100", tokens_per_second, float8
    )


PUBLISHED = (
    PublishedRun(
        "LLaDA-8B, 2.3 T tokens in 0.13 M H800-hours", "arXiv 2502.09992, §2.2",
        get_preset("llada_8b").model, 4096, "h800", 2.3e12 / (0.13e6 * 3600),
    ),
    _torchtitan("FSDP, 8 GPUs", 5762),
    _torchtitan("FSDP, 128 GPUs", 5605),
    _torchtitan("FSDP and compile, 8 GPUs", 6667),
    _torchtitan("FSDP and compile, 128 GPUs", 6514),
    _torchtitan("the same in float8, 8 GPUs", 8532, float8=True),
    _torchtitan("the same in float8, 128 GPUs", 8380, float8=True),
    PublishedRun(
        "DCLM 7B-1x, 138 B tokens in 3,700 H100-hours", "arXiv 2406.11794, Table 1",
        _DCLM_7B, 2048, "h100", 138e9 / (3700 * 3600),
    ),
    PublishedRun(
        "MDLM small, 524 B tokens in about 5 days on 8 A100", "kuleshov-group/mdlm#19",
        get_preset("mdlm_small").model, 1024, "a100", 1e6 * 512 * 1024 / (8 * 5 * 86_400),
    ),
)  # fmt: skip


def mfu_range(runs: Sequence[PublishedRun] = PUBLISHED) -> tuple[float, float]:
    """The lowest and the highest utilisation of the published runs."""
    found = [run.mfu for run in runs]
    return min(found), max(found)
