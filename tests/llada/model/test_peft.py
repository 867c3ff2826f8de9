"""Adapter folders and the real peft library: each loads the other's, and they compute the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llada.errors import UserError
from llada.model.hf import save_model
from llada.model.lora import LoraConfig, MergedWeights, add_adapters, init_adapters
from llada.model.peft import load_adapter, save_adapter
from llada.model.transformer import Transformer

TOKENS = torch.randint(0, 22, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def random_adapters(model: Transformer, config: LoraConfig) -> dict[str, Tensor]:
    adapted = Transformer(model.config)
    add_adapters(adapted, config, torch.float32)
    init_adapters(adapted, seed=0)
    generator = torch.Generator().manual_seed(2)
    return {
        name: p.detach() if name.endswith("lora_A") else torch.randn(p.shape, generator=generator)
        for name, p in adapted.named_parameters()
        if p.requires_grad
    }


@torch.no_grad()
def merged_logits(model: Transformer, adapters: dict[str, Tensor], scale: float) -> Tensor:
    merged = Transformer(model.config)
    merged.load_state_dict(MergedWeights(model.state_dict(), adapters, scale))
    return merged(TOKENS)


@pytest.fixture(
    params=[{}, {"qkv_bias": True}, {"qk_norm": True, "head_width": 8}], ids=["llama", "qwen2", "qwen3"]
)
def causal(request: pytest.FixtureRequest, make_model: Callable, tmp_path: Path) -> Transformer:
    """A network that transformers knows too; its folder is `base`."""
    model = make_model(causal=True, **request.param)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    save_model(model, tmp_path / "base", layout="llama")
    return model


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4),
        LoraConfig(rank=3, alpha=4.0, rslora=True),
        LoraConfig(rank=2, alpha=1.0, targets=("v_proj", "down_proj")),
    ],
    ids=str,
)
def test_peft_puts_our_adapter_onto_transformers_network(
    causal: Transformer, tmp_path: Path, config: LoraConfig
) -> None:
    adapters = random_adapters(causal, config)
    save_adapter(
        tmp_path / "adapter", adapters, config, causal.config, layout="llama", base=str(tmp_path / "base")
    )
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(network, tmp_path / "adapter")
    expected = merged_logits(causal, adapters, config.scale)
    with torch.no_grad():
        torch.testing.assert_close(adapted(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - causal(TOKENS)).abs().max() > 0.1
        torch.testing.assert_close(adapted.merge_and_unload()(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    loaded, scale = load_adapter(tmp_path / "adapter", causal.config, "llama")
    assert scale == config.scale
    assert_same(loaded, adapters)


def test_an_adapter_that_peft_has_made_is_merged(causal: Transformer, tmp_path: Path) -> None:
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(network, settings)
    theirs.save_pretrained(tmp_path / "theirs")
    adapters, scale = load_adapter(tmp_path / "theirs", causal.config, "llama")
    assert scale == 5 / 3**0.5
    assert len(adapters) == 2 * 2 * 2
    with torch.no_grad():
        torch.testing.assert_close(
            merged_logits(causal, adapters, scale), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4
        )


def test_peft_puts_our_adapter_onto_our_network(make_model: Callable, tmp_path: Path) -> None:
    model, config = make_model(), LoraConfig(rank=4)
    adapters = random_adapters(model, config)
    expected = merged_logits(model, adapters, config.scale)
    save_adapter(tmp_path, adapters, config, model.config, layout="ours", base="base")
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(model, tmp_path)
        torch.testing.assert_close(adapted(TOKENS), expected, rtol=1e-4, atol=1e-4)


class OfficialNames(nn.Module):
    """Matrices under the names that LLaDA's own modelling code gives them: `ff_out` is the head and every block's last."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        c = model.config
        shapes = {
            "q_proj": (c.d_model, c.d_model),
            "attn_out": (c.d_model, c.d_model),
            "ff_proj": (c.d_model, c.ffn_dim),
            "ff_out": (c.ffn_dim, c.d_model),
        }
        blocks = [
            nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
            for _ in range(2)
        ]
        transformer = {"ff_out": nn.Linear(c.d_model, c.vocab_size), "blocks": nn.ModuleList(blocks)}
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(transformer)})


def test_in_lladas_layout_the_head_gets_no_adapter(make_model: Callable, tmp_path: Path) -> None:
    model = make_model()
    config = LoraConfig(rank=4, targets=("q_proj", "o_proj", "gate_proj", "down_proj"))
    adapters = random_adapters(model, config)
    save_adapter(tmp_path, adapters, config, model.config, layout="llada", base="base")
    adapted = peft.PeftModel.from_pretrained(OfficialNames(model), tmp_path)
    put = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(put) == len(adapters) == 16  # so the head has none
    block = adapted.base_model.model.model.transformer.blocks[1]
    assert torch.equal(block.ff_out.lora_B.default.weight, adapters["layers.1.down_proj.lora_B"])
    assert torch.equal(block.ff_proj.lora_A.default.weight, adapters["layers.1.gate_proj.lora_A"])
    assert torch.equal(block.attn_out.lora_B.default.weight, adapters["layers.1.o_proj.lora_B"])
    assert_same(load_adapter(tmp_path, model.config, "llada")[0], adapters)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern = .* is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not supported"),
        ({"from_the_future": 1}, "from_the_future = 1 is not supported"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base's weights"),
        ({"r": None}, "is damaged"),
        ({"lora_alpha": "8"}, "is damaged"),
        ({"r": 5}, r"lora_A has shape \(4, 24\), the network asks for \(5, 24\)"),
    ],
    ids=str,
)
def test_what_is_not_the_plain_product_is_refused(
    make_model: Callable, tmp_path: Path, changes: dict, message: str
) -> None:
    model, config = make_model(), LoraConfig(rank=4)
    save_adapter(tmp_path, random_adapters(model, config), config, model.config, layout="llama", base="base")
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path, model.config, "llama")


def test_an_adapter_of_another_network_is_refused(make_model: Callable, tmp_path: Path) -> None:
    model, config = make_model(), LoraConfig(rank=4)
    adapters = random_adapters(model, config)
    save_adapter(tmp_path, adapters, config, model.config, layout="llama", base="base")
    with pytest.raises(UserError, match="belongs to no linear layer of a block of this network"):
        load_adapter(tmp_path, model.config, "llada")
    with pytest.raises(UserError, match="layers.1.* belongs to no linear layer"):
        load_adapter(tmp_path, make_model(num_layers=1).config, "llama")
    with pytest.raises(UserError, match=r"lora_\w has shape .* the network asks for"):
        load_adapter(tmp_path, make_model(d_model=32).config, "llama")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers.1.up_proj.lora_B is missing beside"):
        load_adapter(tmp_path, model.config, "llama")
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has no matrices"):
        load_adapter(tmp_path, model.config, "llama")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="is damaged"):
        load_adapter(tmp_path, model.config, "llama")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="weight file adapter_model.safetensors is missing"):
        load_adapter(tmp_path, model.config, "llama")
    with pytest.raises(UserError, match="is no adapter: it has no adapter_config.json"):
        load_adapter(tmp_path / "nowhere", model.config, "llama")
