"""Checkpoint folders: ours, the official GSAI-ML/LLaDA layout, and standard Llama tensor names (iLLaDA, AR Llamas).

A folder is `config.json` plus `model.safetensors` (or shards and `model.safetensors.index.json`), plus the
tokenizer's files if it has any. Loading fails on any missing, unused or mis-shaped tensor and names it: transformers 5
silently re-initialised 226 of iLLaDA's 291 tensors.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer


class MissingCheckpointError(UserError, FileNotFoundError):
    """A folder, or a file that its index names, is not there."""


Layout = Literal["ours", "llada", "llama"]
SHARD_BYTES = 5 * 1024**3
OUR_MODEL_TYPE = "masked_diffusion_transformer"

# ours -> theirs. `{}` stands for the layer number. Beware: in LLaDA's layout `ff_out` names both the head and
# every block's down-projection, and `ff_proj` is the gate.
LAYER_NAMES: dict[Layout, dict[str, str]] = {
    "llada": {
        "attn_norm": "attn_norm",
        "q_proj": "q_proj",
        "k_proj": "k_proj",
        "v_proj": "v_proj",
        "o_proj": "attn_out",
        "ffn_norm": "ff_norm",
        "gate_proj": "ff_proj",
        "up_proj": "up_proj",
        "down_proj": "ff_out",
    },
    "llama": {
        "attn_norm": "input_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "o_proj": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "gate_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "down_proj": "mlp.down_proj",
    },
}
TOP_NAMES: dict[Layout, dict[str, str]] = {
    "llada": {
        "embed": "model.transformer.wte",
        "norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
    },
    "llama": {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
}
LAYER_PREFIX: dict[Layout, str] = {"llada": "model.transformer.blocks.", "llama": "model.layers."}


def tensor_names(config: ModelConfig, layout: Layout) -> dict[str, str]:
    """Our parameter name -> the layout's tensor name, for every parameter of the network."""
    top = ["embed", "norm"] + ([] if config.tie_embeddings else ["lm_head"])
    layer = list(LAYER_NAMES["llada"])
    if layout == "ours":
        ours = [f"{name}.weight" for name in top]
        ours += [f"layers.{i}.{name}.weight" for i in range(config.num_layers) for name in layer]
        return {name: name for name in ours}
    names = {f"{name}.weight": f"{TOP_NAMES[layout][name]}.weight" for name in top}
    for i in range(config.num_layers):
        for name in layer:
            names[f"layers.{i}.{name}.weight"] = (
                f"{LAYER_PREFIX[layout]}{i}.{LAYER_NAMES[layout][name]}.weight"
            )
    return names


def detect_layout(config: dict[str, Any], folder: Path) -> Layout:
    """Which layout a config.json describes."""
    model_type = str(config.get("model_type"))
    if model_type == OUR_MODEL_TYPE:
        return "ours"
    if model_type == "llada" and "d_model" in config:
        return "llada"
    if "hidden_size" in config and ("llada" in model_type.lower() or model_type == "llama"):
        return "llama"
    raise UserError(
        f"{folder}/config.json: model_type {model_type!r} is none of '{OUR_MODEL_TYPE}', 'llada' (GSAI-ML/LLaDA), "
        f"'illada' or 'llama' (standard Llama tensor names)"
    )


def parse_config(config: dict[str, Any], layout: Layout, folder: Path) -> ModelConfig:
    """ModelConfig of a config.json, refusing what this network cannot express instead of dropping it."""
    if layout == "ours":
        known = {f.name for f in fields(ModelConfig)}
        unknown = sorted(set(config) - known - {"model_type"})
        if unknown:
            raise UserError(f"{folder}/config.json: unknown keys {unknown}")
        return ModelConfig(**{k: v for k, v in config.items() if k in known})
    if layout == "llada":
        required = {
            "activation_type": "silu",
            "layer_norm_type": "rms",
            "block_type": "llama",
            "rope": True,
            "alibi": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "attention_layer_norm": False,
            "input_emb_norm": False,
            "scale_logits": False,
        }
        _refuse_differences(config, required, folder)
        return ModelConfig(
            vocab_size=config.get("embedding_size") or config["vocab_size"],
            d_model=config["d_model"],
            num_layers=config["n_layers"],
            num_heads=config["n_heads"],
            num_kv_heads=config.get("n_kv_heads") or config["n_heads"],
            ffn_dim=config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
            max_length=config["max_sequence_length"],
            rope_theta=config["rope_theta"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-5),
            tie_embeddings=config["weight_tying"],
            mask_token_id=config.get("mask_token_id"),
            eos_token_id=config.get("eos_token_id"),
            pad_token_id=config.get("pad_token_id"),
        )
    required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    _refuse_differences(config, required, folder)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise UserError(f"{folder}/config.json: scaled rotary positions ({scaling}) are not supported")
    eos = config.get("eos_token_id")
    is_ar = config["model_type"] == "llama"
    return ModelConfig(
        vocab_size=config["vocab_size"],
        d_model=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        ffn_dim=config["intermediate_size"],
        max_length=config["max_position_embeddings"],
        rope_theta=config.get("rope_theta") or scaling.get("rope_theta", 10_000.0),
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        tie_embeddings=config.get("tie_word_embeddings", False),
        causal=is_ar,
        # iLLaDA's config declares no mask id; its documentation says 5.
        mask_token_id=config.get("mask_token_id", None if is_ar else 5),
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        pad_token_id=config.get("pad_token_id"),
    )


def _refuse_differences(config: dict[str, Any], required: dict[str, Any], folder: Path) -> None:
    for key, value in required.items():
        if config.get(key, value) != value:
            raise UserError(f"{folder}/config.json: {key} = {config[key]!r} is not supported, only {value!r}")


def format_config(config: ModelConfig, layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a folder in this layout."""
    if layout == "ours":
        return {"model_type": OUR_MODEL_TYPE, **asdict(config)}
    torch_dtype = str(dtype).removeprefix("torch.")
    if layout == "llama":
        family = {"architectures": ["ILLaDAForCausalLM"], "model_type": "illada"}
        if config.causal:
            family = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        return {
            **family,
            "hidden_act": "silu",
            "hidden_size": config.d_model,
            "intermediate_size": config.ffn_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_length,
            "rope_theta": config.rope_theta,
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "mask_token_id": config.mask_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "torch_dtype": torch_dtype,
        }
    if config.causal:
        raise UserError("a causal network has no place in LLaDA's layout: convert it with --layout llama")
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": config.d_model,
        "embedding_dropout": 0.0,
        "embedding_size": config.vocab_size,
        "eos_token_id": config.eos_token_id,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": config.mask_token_id,
        "max_sequence_length": config.max_length,
        "mlp_hidden_size": config.ffn_dim,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": config.num_heads,
        "n_kv_heads": config.kv_heads,
        "n_layers": config.num_layers,
        "pad_token_id": config.pad_token_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": config.rope_theta,
        "scale_logits": False,
        "torch_dtype": torch_dtype,
        "use_cache": False,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tie_embeddings,
    }


def read_config(folder: str | Path) -> tuple[ModelConfig, Layout]:
    """Config and layout of a local checkpoint folder. Raises UserError: there is none, or one that we cannot express."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise MissingCheckpointError(f"{folder} is no checkpoint: it has no config.json")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    layout = detect_layout(raw, Path(folder))
    try:
        return parse_config(raw, layout, Path(folder)), layout
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: incomplete or malformed ({error})") from error


def load_state(folder: str | Path, config: ModelConfig, layout: Layout) -> dict[str, Tensor]:
    """Our parameter names -> tensors, memory-mapped from the folder's safetensors.

    Raises:
        UserError: missing, unused or mis-shaped tensors, each named.
    """
    folder = Path(folder)
    where: dict[str, Path] = {}
    for file in _weight_files(folder):
        with _open_weights(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in where:
                    raise UserError(f"{folder}: tensor {name} stands in {where[name].name} and {file.name}")
                where[name] = file
    names = tensor_names(config, layout)
    tied_copy = tensor_names(_untied(config), layout)["lm_head.weight"] if config.tie_embeddings else None
    missing = sorted(set(names.values()) - set(where))
    unused = sorted(set(where) - set(names.values()) - {tied_copy})
    if missing or unused:
        raise UserError(f"{folder}: missing tensors {missing or 'none'}; unused tensors {unused or 'none'}")
    shapes = {name: p.shape for name, p in _meta_network(config).named_parameters()}
    state: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        with _open_weights(where[theirs]) as handle:
            state[ours] = handle.get_tensor(theirs)
        if state[ours].shape != shapes[ours]:
            raise UserError(
                f"{folder}: tensor {theirs} has shape {tuple(state[ours].shape)}, "
                f"the config asks for {tuple(shapes[ours])}"
            )
    if tied_copy in where:
        with _open_weights(where[tied_copy]) as handle:
            if not torch.equal(handle.get_tensor(tied_copy), state["embed.weight"]):
                raise UserError(f"{folder}: embeddings are tied but {tied_copy} differs from the embedding")
    return state


@contextmanager
def _open_weights(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}): copy or download it again") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    for shard in shards:
        if not (folder / shard).is_file():
            raise MissingCheckpointError(f"{folder}: weight file {shard} is missing")
    return [folder / shard for shard in shards]


def _untied(config: ModelConfig) -> ModelConfig:
    return ModelConfig(**{**asdict(config), "tie_embeddings": False})


def _meta_network(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def load_model(
    folder: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Transformer:
    """The network of a local checkpoint folder in any layout, in evaluation mode.

    Args:
        device: where to put it; None means CPU.
        dtype: None keeps the file's.
    """
    config, layout = read_config(folder)
    state = load_state(folder, config, layout)
    model = _meta_network(config)
    state = {name: tensor.to(device=device or "cpu", dtype=dtype) for name, tensor in state.items()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["embed.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    return model.eval()


def save_state(
    folder: str | Path, state: dict[str, Tensor], config: ModelConfig, *, layout: Layout = "ours"
) -> None:
    """Write a checkpoint folder: weights first, config.json last (a folder without it is no checkpoint).

    `state` maps our parameter names to full tensors; a tied head is written once, as the embedding.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = tensor_names(config, layout)
    tensors = {theirs: state[ours].detach().contiguous().cpu() for ours, theirs in names.items()}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    index_file = folder / "model.safetensors.index.json"
    index_file.unlink(missing_ok=True)  # of an earlier, sharded checkpoint here
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index_file.write_text(json.dumps(index, indent=2) + "\n")
    dtype = next(iter(tensors.values())).dtype
    (folder / "config.json").write_text(json.dumps(format_config(config, layout, dtype), indent=2) + "\n")


def save_model(model: Transformer, folder: str | Path, *, layout: Layout = "ours") -> None:
    """Write an unsharded network as a checkpoint folder."""
    save_state(folder, dict(model.state_dict()), model.config, layout=layout)


TOKENIZER_FILES = re.compile(r"(tokenizer.*|special_tokens_map|added_tokens|vocab|merges|chat_template)\.\w+")


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: Layout | None = None,
    mask_token_id: int | None = None,
) -> ModelConfig:
    """Rewrite a checkpoint folder in another layout, bit for bit.

    Args:
        layout: of the target. None: ours, or LLaDA's if the source is already ours.
        mask_token_id: turns an autoregressive checkpoint into the start of a masked-diffusion one: attention becomes
            bidirectional, and this row of the vocabulary the mask.

    Raises:
        UserError: `target` is `source` (whose files are being read while the target is written), or what loading refuses.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise UserError(f"cannot convert {source} onto itself: choose another output folder")
    config, source_layout = read_config(source)
    if layout is None:
        layout = "ours" if source_layout != "ours" else ("llama" if config.causal else "llada")
    state = load_state(source, config, source_layout)
    if mask_token_id is not None:
        config = ModelConfig(**{**asdict(config), "causal": False, "mask_token_id": mask_token_id})
    save_state(target, state, config, layout=layout)
    for file in Path(source).iterdir():
        if TOKENIZER_FILES.fullmatch(file.name):
            shutil.copy2(file, Path(target) / file.name)
    return config
