"""Low-rank adapters (LoRA, arXiv 2106.09685), put into the network from outside.

    y = W x + s · B A x        W (out, in) frozen, A (rank, in) and B (out, rank) learnt, s = alpha / rank

B is zero at the start, so that the first step is the base network's. For a network of P parameters in bfloat16 an adapter of
T parameters costs 2 P + 16 T bytes (its float32 weights, gradients and AdamW's two moments) where all parameters cost 16 P:
LLaDA-8B with rank 64 has T = 168 M, 18.7 GB instead of 128 GB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llada.errors import hint
from llada.model.initial import Rows, draw_normal_
from llada.model.transformer import Block, ModelConfig, Transformer
from llada.settings import check_limits, limited, require

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the linear layers of the blocks, in place of training all weights."""

    rank: int | None = limited(None, low=1)
    """Of the adapters; None: all weights are trained."""
    alpha: float | None = limited(None, above=0)
    """The adapters' product counts alpha / rank times; None: twice the rank."""
    rslora: bool = False
    """It counts alpha / √rank times instead, which keeps large ranks from learning more slowly (arXiv 2312.03732)."""
    targets: tuple[Target, ...] = TARGETS
    """Which linear layers of each block get one."""

    def __post_init__(self) -> None:
        check_limits(self, "lora")
        for name in self.targets:
            require(
                name in TARGETS,
                f"lora: targets has no {name!r} among the linear layers; {hint(name, TARGETS)}",
            )
        require(len(self.targets) > 0, "lora: targets is empty: name a linear layer, or leave it out for all")
        require(
            len(set(self.targets)) == len(self.targets),
            f"lora: targets names a linear layer twice: {', '.join(self.targets)}",
        )
        require(
            self.rank is not None or (self.alpha, self.rslora, self.targets) == (None, False, TARGETS),
            "lora: without a rank there are no adapters: set lora.rank too",
        )

    @property
    def scale(self) -> float:
        """What the product B A counts."""
        assert self.rank is not None
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def content(self) -> dict[str, Any]:
        """What the adapters compute with, as a run's identity holds it."""
        return {
            "rank": self.rank,
            "scale": self.scale,
            "targets": [name for name in TARGETS if name in self.targets],
        }


def adapted_linears(config: LoraConfig, model: ModelConfig) -> dict[str, tuple[int, int]]:
    """{name of a linear layer in our network: (out, in)} of all that get an adapter.

    Raises UserError where the rank is beyond that of one of them.
    """
    with torch.device("meta"):
        block = Block(model)
    shapes: dict[str, tuple[int, int]] = {}
    for name in config.content()["targets"]:
        out_features, in_features = getattr(block, name).weight.shape
        require(
            config.rank is None or config.rank <= min(out_features, in_features),
            f"lora: rank {config.rank} is more than {name} ({out_features} × {in_features}) can have: "
            f"at most {min(out_features, in_features)}, or leave {name} out of targets",
        )
        shapes |= {f"layers.{i}.{name}": (out_features, in_features) for i in range(model.num_layers)}
    return shapes


class LoRALinear(nn.Linear):
    """A linear layer whose weight (and bias) are frozen, and its adapter: y = W x + s · B A x.

    The names of what is frozen stay those of the layer that it replaces.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device=device, dtype=torch.float32))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        # The scale on the narrowest of the three.
        return super().forward(x) + F.linear(self.scale * F.linear(x, self.lora_A), self.lora_B)


def add_adapters(model: Transformer, config: LoraConfig, dtype: torch.dtype) -> None:
    """Freeze the network and give its linear layers adapters, which `init_adapters` fills.

    The frozen matrices are kept in `dtype`, that of the forward pass, which rounds them to it all the same.

    Raises UserError where the rank is beyond that of a layer.
    """
    adapted_linears(config, model.config)
    assert config.rank is not None
    model.requires_grad_(False)
    for layer in model.layers:
        for name in config.targets:
            setattr(layer, name, LoRALinear(getattr(layer, name), config.rank, config.scale))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed.weight


@torch.no_grad()
def init_adapters(model: Transformer, seed: int) -> None:
    """A normal with std 1/√(3·in), the spread of LoRA's reference code and of peft; B zero.

    Numbers are functions of the seed, the layer's name and the row (initial.py): of any number of workers each draws its own.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A"):
            draw_normal_(parameter, seed, name, 1 / math.sqrt(3 * parameter.shape[1]))
        elif name.endswith("lora_B"):
            parameter.zero_()


class MergedWeights(Mapping[str, Tensor]):
    """The weights of a plain network that computes what frozen weights and adapters compute together, by our parameter names.
    Each is computed when it is asked for: the sum in float32, the result of the frozen weight's type.

    Args:
        frozen: our parameter names -> tensors, in memory or in a file.
        adapters: `<linear layer>.lora_A` and `.lora_B` -> matrices.
        scale: what their product counts.
    """

    def __init__(self, frozen: Mapping[str, Rows], adapters: Mapping[str, Tensor], scale: float) -> None:
        self.frozen, self.adapters, self.scale = frozen, adapters, scale

    def __getitem__(self, name: str) -> Tensor:
        weight, layer = self.frozen[name][:], name.removesuffix(".weight")
        if f"{layer}.lora_A" not in self.adapters:
            return weight
        A, B = (self.adapters[f"{layer}.lora_{matrix}"].to(weight.device).float() for matrix in "AB")
        return (weight.float() + self.scale * B @ A).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.frozen)

    def __len__(self) -> int:
        return len(self.frozen)


def training_flops(model: ModelConfig, config: LoraConfig, row_length: int) -> float:
    """Forward and backward FLOPs of one token (see `ModelConfig.training_flops_per_token`); with adapters, frozen weights
    need no gradient of their own: 4 per weight instead of 6."""
    if config.rank is None:
        return model.training_flops_per_token(row_length)
    of_weights = model.training_flops_per_token(0)
    copies = 1 if model.block_length is None else 2
    adapters = 6.0 * copies * num_adapter_parameters(config, model)
    return model.training_flops_per_token(row_length) - of_weights / 3 + adapters


def num_adapter_parameters(config: LoraConfig, model: ModelConfig) -> int:
    """Weights that are trained."""
    assert config.rank is not None
    return sum(config.rank * (rows + columns) for rows, columns in adapted_linears(config, model).values())
