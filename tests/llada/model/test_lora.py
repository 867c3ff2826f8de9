"""Adapters: nothing at the start, the formula's product, the formula's gradient, and equal to the merged weights."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.lora import (
    TARGETS,
    LoraConfig,
    LoRALinear,
    MergedWeights,
    adapted_linears,
    add_adapters,
    init_adapters,
    num_adapter_parameters,
)
from llada.model.transformer import Transformer

TOKENS = torch.randint(0, 22, (3, 11), generator=torch.Generator().manual_seed(1))


def adapt(model: Transformer, config: LoraConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    adapted = copy.deepcopy(model)
    add_adapters(adapted, config, dtype)
    init_adapters(adapted, seed=0)
    return adapted


def trainable(model: Transformer) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def fill_b(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.normal_(std=0.3, generator=generator)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True}, {"block_length": 4}, {"qkv_bias": True, "qk_norm": True}],
    ids=str,
)
def test_the_start_is_the_base_network(make_model: Callable, changes: dict[str, Any]) -> None:
    """Also where the frozen matrices are kept in the precision that the forward rounds them to."""
    model = make_model(**changes)
    assert torch.equal(adapt(model, LoraConfig(rank=3))(TOKENS), model(TOKENS))
    half = adapt(model, LoraConfig(rank=3), torch.bfloat16)
    for name, parameter in half.named_parameters():
        is_matrix = parameter.ndim == 2 and "lora" not in name
        assert parameter.dtype == (torch.bfloat16 if is_matrix else torch.float32), name
    model = copy.deepcopy(model)
    model.embed.register_forward_hook(lambda module, args, rows: rows.bfloat16())  # as in training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 3},
        {"rank": 4, "alpha": 5.0, "rslora": True, "targets": ("v_proj", "down_proj")},
        {"rank": 12, "alpha": 0.5},
    ],
    ids=str,
)
def test_adapters_are_their_product_added_to_the_weights(
    make_model: Callable, settings: dict[str, Any]
) -> None:
    model, config = make_model(), LoraConfig(**settings)
    adapted = adapt(model, config)
    fill_b(adapted)
    alpha = settings.get("alpha", 2 * config.rank)
    scale = alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
    state = model.state_dict()
    merged = Transformer(model.config)
    merged.load_state_dict(MergedWeights(state, trainable(adapted), config.scale))
    torch.testing.assert_close(merged(TOKENS), adapted(TOKENS), rtol=1e-5, atol=1e-5)
    assert (merged(TOKENS) - model(TOKENS)).abs().max() > 0.1
    for name, weight in merged.state_dict().items():
        layer = adapted.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, LoRALinear):
            by_hand = state[name] + scale * layer.lora_B.detach() @ layer.lora_A.detach()
            torch.testing.assert_close(weight, by_hand, rtol=1e-6, atol=1e-6)
            assert name.split(".")[2] in config.targets
        else:
            assert torch.equal(weight, state[name])


def test_weights_are_merged_in_float32_and_keep_their_type(make_model: Callable) -> None:
    model, config = make_model(), LoraConfig(rank=2, targets=("q_proj",))
    adapted = adapt(model, config)
    fill_b(adapted)
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    layer = adapted.layers[1].q_proj
    expected = (
        half["layers.1.q_proj.weight"].float() + config.scale * layer.lora_B @ layer.lora_A
    ).bfloat16()
    assert torch.equal(
        MergedWeights(half, trainable(adapted), config.scale)["layers.1.q_proj.weight"], expected
    )


@pytest.mark.parametrize("targets", [TARGETS, ("k_proj", "up_proj")], ids=str)
def test_the_first_gradient_is_the_full_ones_projection(
    make_model: Callable, targets: tuple[str, ...]
) -> None:
    """With G the gradient of W: ∂/∂B = s G Aᵀ and ∂/∂A = s Bᵀ G = 0. With A the identity, a step is full fine-tuning's."""
    full = make_model()
    full(TOKENS).square().mean().backward()
    config = LoraConfig(rank=5, alpha=2.0, targets=targets)
    adapted = adapt(full, config)
    adapted(TOKENS).square().mean().backward()
    seen = 0
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoRALinear):
            G = full.get_parameter(f"{name}.weight").grad
            torch.testing.assert_close(layer.lora_B.grad, 0.4 * G @ layer.lora_A.T, rtol=1e-4, atol=1e-7)
            assert layer.lora_B.grad.abs().max() > 1e-5
            assert not layer.lora_A.grad.any()
            seen += 1
    assert seen == 2 * len(targets)
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == set(trainable(adapted))


def test_with_full_rank_the_first_step_is_full_fine_tunings(make_model: Callable) -> None:
    """Plain gradient descent, A the identity: W − lr·s²·G."""
    full, lr = make_model(), 0.1
    full(TOKENS).square().mean().backward()
    config = LoraConfig(rank=24, alpha=12.0, targets=("q_proj", "o_proj"))
    adapted = adapt(full, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("lora_A"):
                parameter.copy_(torch.eye(24))
    adapted(TOKENS).square().mean().backward()
    torch.optim.SGD(trainable(adapted).values(), lr=lr).step()
    merged = MergedWeights(full.state_dict(), trainable(adapted), config.scale)
    for i in range(2):
        weight = full.layers[i].q_proj.weight
        expected = weight - lr * config.scale**2 * weight.grad
        torch.testing.assert_close(merged[f"layers.{i}.q_proj.weight"], expected, rtol=1e-4, atol=1e-7)


def test_a_is_a_function_of_the_seed_and_its_name(make_model: Callable) -> None:
    model = make_model(d_model=64, ffn_dim=128)
    every = trainable(adapt(model, LoraConfig(rank=16)))
    some = trainable(adapt(model, LoraConfig(rank=16, targets=("v_proj", "down_proj"))))
    assert len(every) == 28
    assert len(some) == 8
    assert all(torch.equal(tensor, every[name]) for name, tensor in some.items())
    other = copy.deepcopy(model)
    add_adapters(other, LoraConfig(rank=16), torch.float32)
    init_adapters(other, seed=1)
    drawn = set()
    for name, tensor in every.items():
        if name.endswith("lora_B"):
            assert not tensor.any()
            continue
        bound = 1 / math.sqrt(tensor.shape[1])
        assert tensor.detach().std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not torch.equal(tensor, other.get_parameter(name))
        drawn.add(tensor[0, 0].item())
    assert len(drawn) == 14


def test_an_adapted_block_is_one_graph(make_model: Callable) -> None:
    adapted = adapt(make_model(num_layers=1), LoraConfig(rank=3))
    fill_b(adapted)
    compiled = copy.deepcopy(adapted)
    for layer in compiled.layers:
        layer.compile(fullgraph=True, backend="eager")
    for model in (adapted, compiled):
        model(TOKENS).square().mean().backward()
    for name, parameter in trainable(compiled).items():
        torch.testing.assert_close(parameter.grad, adapted.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_biases_of_a_layer_are_frozen_with_it() -> None:
    base = torch.nn.Linear(6, 4)
    layer = LoRALinear(copy.deepcopy(base), rank=2, scale=1.0)
    torch.nn.init.ones_(layer.lora_A)
    torch.nn.init.zeros_(layer.lora_B)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "lora_A", "lora_B"]


def test_the_number_of_trained_weights(make_model: Callable) -> None:
    model = make_model()
    for config in (LoraConfig(rank=3), LoraConfig(rank=5, targets=("k_proj", "gate_proj"))):
        counted = sum(p.numel() for p in trainable(adapt(model, config)).values())
        assert num_adapter_parameters(config, model.config) == counted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"rank": 4, "alpha": 0.0}, "alpha must be above 0"),
        (
            {"rank": 4, "targets": ("q_proj", "k_prj")},
            "no 'k_prj' among the linear layers; did you mean 'k_proj'",
        ),
        ({"rank": 4, "targets": ("lm_head",)}, "no 'lm_head' among the linear layers"),
        ({"rank": 4, "targets": ()}, "targets is empty"),
        ({"rank": 4, "targets": ("q_proj", "q_proj")}, "names a linear layer twice"),
        ({"alpha": 8.0}, "without a rank there are no adapters: set lora.rank"),
        ({"targets": ("q_proj",)}, "without a rank"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"lora: .*{message}"):
        LoraConfig(**settings)


def test_a_rank_beyond_a_layers_is_refused_by_name(make_model: Callable) -> None:
    """Of 24 × 24, 12 × 24 (two key/value heads) and 20 × 24."""
    shape = make_model().config
    for rank, targets in ((25, ("q_proj",)), (13, TARGETS), (21, ("down_proj",))):
        with pytest.raises(UserError, match=rf"rank {rank} is more than \w+ .*at most {rank - 1}"):
            adapted_linears(LoraConfig(rank=rank, targets=targets), shape)
        adapted_linears(LoraConfig(rank=rank - 1, targets=targets), shape)
