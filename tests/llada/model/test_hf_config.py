"""What a config.json says is honoured or refused by name, in the layouts of others too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llada.errors import UserError
from llada.model.hf import convert, load_model, save_model
from llada.model.hf_config import format_config, read_config, read_end_ids
from llada.model.transformer import Transformer

MakeModel = Callable[..., Transformer]
TOKENS = torch.arange(12).reshape(2, 6)
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}


def edit(folder: Path, *without: str, **changes: Any) -> None:
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in without}
    path.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("llada", {"rope_full_precision": False}, "rope_full_precision = False is not supported, only True"),
        (
            "llada",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling = .*linear.* not supported",
        ),
        ("llada", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_parameters = .*yarn"),
        ("llada", {"rope_parameters": {**DEFAULT_ROPE, "rope_theta": 1e4}}, "rope_theta = .* contradict"),
        ("llada", {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}}, "not supported"),
        ("llada", {"layer_norm_with_affine": False}, "layer_norm_with_affine = False"),
        ("llada", {"bias_for_layer_norm": True}, "bias_for_layer_norm = True"),
        ("llada", {"block_group_size": 2}, "block_group_size = 2"),
        ("llada", {"activation_type": "swiglu"}, "activation_type = 'swiglu'"),
        ("llada", {"alibi": True}, "alibi = True"),
        ("llada", {"scale_logits": True}, "scale_logits = True"),
        ("llada", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not known here, and may change"),
        ("llada", {"residual_multiplier": 0.5}, "residual_multiplier = 0.5 is not known"),
        ("llada", {"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            "llada",
            {"multi_query_attention": True, "n_kv_heads": 2},
            "multi_query_attention and n_kv_heads = 2",
        ),
        ("llada", {"tie_word_embeddings": True}, "weight_tying = False and tie_word_embeddings = True"),
        ("llada", {"d_model": "24"}, r"config\.json: model: d_model must be int, not '24'"),
        ("llada", {"rope_theta": 0.0}, "rope_theta must be above 0"),
        ("llada", {"eos_token_id": [1, "2"]}, "eos_token_id"),
        (
            "llama",
            {"head_dim": 8},
            r"tensor model\.layers\.0\.self_attn\.q_proj.* the config asks for \(32, 24\)",
        ),
        ("llama", {"head_dim": 7}, "head_width 7 must be even"),
        ("llama", {"model_type": "qwen2"}, r"missing tensors .*self_attn\.q_proj\.bias"),
        ("llama", {"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window = True is not"),
        ("llama", {"model_type": "qwen3", "attention_bias": True}, "attention_bias = True is not supported"),
        ("llama", {"model_type": "mistral"}, "'mistral' is none of .*qwen3"),
        ("llama", {"sliding_window": 4096}, "sliding_window = 4096"),
        ("llama", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {**DEFAULT_ROPE, "rope_type": "llama3"}}, "llama3.*needs factor"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic.*not supported"),
        ("llama", {"rope_parameters": {"full_attention": DEFAULT_ROPE}}, "rope_parameters"),
        ("llama", {"logit_scale": 0.1}, "logit_scale = 0.1"),
        ("llama", {"qk_layernorm": True}, "qk_layernorm = True"),
        ("ours", {"rope_factor": None}, "unknown keys.*rope_factor"),
        ("ours", {"rope_scaling": None}, "model.rope_scaling must hold settings, not None"),
        (
            "ours",
            {"rope_scaling": {"kind": "linear", "faktor": 2}},
            "unknown setting model.rope_scaling.faktor",
        ),
        ("ours", {"rope_scaling": {"kind": "linear"}}, "kind linear needs factor"),
    ],
    ids=str,
)
def test_what_would_change_the_computation_is_refused_by_name(
    make_model: MakeModel, tmp_path: Path, layout: Any, change: dict[str, Any], message: str
) -> None:
    save_model(make_model(), tmp_path, layout=layout)
    edit(tmp_path, **change)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "without", "change"),
    [
        ("llada", (), {"rope_scaling": None, "rope_parameters": DEFAULT_ROPE}),
        ("llada", ("rope_theta",), {"rope_parameters": DEFAULT_ROPE}),
        ("llada", (), {"include_qkv_bias": None, "bias_for_layer_norm": None, "clip_qkv": None}),
        ("llada", (), {"attention_dropout": 0.1, "torch_dtype": "bfloat16", "id2label": {"0": "a"}}),
        ("llama", ("rope_theta",), {"rope_parameters": DEFAULT_ROPE, "layer_types": ["full_attention"] * 2}),
        ("llama", (), {"sliding_window": None, "pretraining_tp": 1, "transformers_version": "5.0.0"}),
    ],
    ids=str,
)
def test_what_says_the_same_or_nothing_is_taken(
    make_model: MakeModel, tmp_path: Path, layout: Any, without: tuple[str, ...], change: dict[str, Any]
) -> None:
    model = make_model(rope_theta=500_000.0)
    save_model(model, tmp_path, layout=layout)
    edit(tmp_path, *without, **change)
    assert torch.equal(load_model(tmp_path)(TOKENS), model(TOKENS))


def test_llama_3_2_is_read_as_it_is_published(tmp_path: Path) -> None:
    rope = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**rope, "original_max_position_embeddings": 8192},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config, layout = read_config(tmp_path)
    assert config.num_parameters == 1_235_814_400
    written = format_config(config, layout, torch.bfloat16)
    assert {key: value for key, value in published.items() if key in written} == {
        key: value for key, value in written.items() if key in published
    }
    assert {"rope_theta", "rope_scaling", "max_position_embeddings"} <= written.keys()
    ours = format_config(config, "ours", torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(ours))
    assert read_config(tmp_path) == (config, "ours")


def test_others_of_dreams_type_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    save_model(make_model(qkv_bias=True, shift=True), tmp_path, layout="llama")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "Dream"
    edit(tmp_path, architectures=["DreamForCausalLM"])
    with pytest.raises(
        UserError, match=r"architectures = \['DreamForCausalLM'\] is not supported, only DreamModel"
    ):
        load_model(tmp_path)


def test_qwens_window_counts_for_nothing_unless_used(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(causal=True, qk_norm=True, head_width=128)
    save_model(model, tmp_path, layout="llama")
    edit(tmp_path, "head_dim", sliding_window=32768, use_sliding_window=False, max_window_layers=28)
    assert torch.equal(
        load_model(tmp_path)(TOKENS), model(TOKENS)
    )  # and 128 is Qwen3's width where none is said


def test_multi_query_attention_is_one_key_head(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(num_kv_heads=1)
    save_model(model, tmp_path, layout="llada")
    edit(tmp_path, "n_kv_heads", multi_query_attention=True)
    assert torch.equal(load_model(tmp_path)(TOKENS), model(TOKENS))


def test_a_missing_epsilon_is_that_of_the_family(make_model: MakeModel, tmp_path: Path) -> None:
    save_model(make_model(causal=True), tmp_path, layout="llama")
    edit(tmp_path, "rms_norm_eps")
    assert read_config(tmp_path)[0].rms_norm_eps == 1e-6  # transformers' Llama


def test_every_end_of_a_text_is_known(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(eos_token_id=3)
    save_model(model, tmp_path, layout="llama")
    assert read_end_ids(tmp_path, model.config) == (3,)
    edit(tmp_path, eos_token_id=[3, 7])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 3]}')
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert loaded.end_ids == (3, 7, 9)
    convert(tmp_path, tmp_path / "ours")
    assert load_model(tmp_path / "ours").end_ids == (3, 7, 9)
    save_model(loaded, tmp_path / "saved")
    assert load_model(tmp_path / "saved").end_ids == (3, 7, 9)
    save_model(model, tmp_path / "saved")
    assert load_model(tmp_path / "saved").end_ids == (3,)
    for content, message in (
        ("{", "not valid JSON"),
        ('{"eos_token_id": 99}', "99 lies outside"),
        ("[]", "object"),
    ):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(UserError, match=rf"generation_config\.json.*{message}"):
            load_model(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe{}", b"null", b"[" * 100_000], ids=repr)
def test_a_damaged_config_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: not"):
        load_model(tmp_path)
