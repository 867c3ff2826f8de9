"""The config.json of a checkpoint folder in any layout: read strictly, and written.

What a config says about the computation is honoured or refused by name. A key that is unknown here is refused unless it
asks for nothing (null, false, 0, an empty list), because a network that silently leaves something out computes something
else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from llada.errors import UserError
from llada.model.hf_rope import ROPE_KEYS, read_rope, write_rope
from llada.model.rotary import RopeScaling
from llada.model.transformer import ModelConfig
from llada.settings import from_dict, require, shorten


class MissingCheckpointError(UserError, FileNotFoundError):
    """A folder, or a file that its index names, is not there."""


Layout = Literal["ours", "llada", "llama"]
OUR_MODEL_TYPE = "masked_diffusion_transformer"


@dataclass(frozen=True)
class Family:
    """Networks with standard tensor names that a `model_type` stands for."""

    architecture: str
    causal: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    shift: bool = False
    rms_norm_eps: float = 1e-6
    """Where the config says none."""
    head_dim: int | None = None
    """The same; None: hidden_size / num_attention_heads."""
    mask_token_id: int | None = None
    """The same."""


# a2d-…: bidirectional networks made of autoregressive ones, as dLLM (ZHZisZZ/dllm) calls them.
FAMILIES = {
    # iLLaDA's config declares no mask id; its documentation says 5.
    "illada": Family("ILLaDAForCausalLM", causal=False, rms_norm_eps=1e-5, mask_token_id=5),
    "llama": Family("LlamaForCausalLM", causal=True),
    "qwen2": Family("Qwen2ForCausalLM", causal=True, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", causal=True, qk_norm=True, head_dim=128),
    "a2d-llama": Family("A2DLlamaLMHeadModel", causal=False),
    "a2d-qwen2": Family("A2DQwen2LMHeadModel", causal=False, qkv_bias=True),
    "a2d-qwen3": Family("A2DQwen3LMHeadModel", causal=False, qk_norm=True, head_dim=128),
    # Dream, DiffuCoder.
    "Dream": Family("DreamModel", causal=False, qkv_bias=True, shift=True),
}


def detect_layout(config: dict[str, Any], folder: Path) -> Layout:
    """Which layout a config.json describes."""
    model_type = str(config.get("model_type"))
    if model_type == OUR_MODEL_TYPE:
        return "ours"
    if model_type == "llada" and "d_model" in config:
        return "llada"
    if "hidden_size" in config and _family(model_type) is not None:
        return "llama"
    raise UserError(
        f"{folder}/config.json: model_type {model_type!r} is none of '{OUR_MODEL_TYPE}', 'llada' (GSAI-ML/LLaDA), "
        f"or of those with standard tensor names: {', '.join(FAMILIES)}"
    )


def _family(model_type: str) -> Family | None:
    return FAMILIES.get("illada" if "llada" in model_type.lower() else model_type)


# Settings of a layout's config that say nothing about a forward in evaluation mode: of initialisation, dropout, other
# software, and of generating with transformers. The keys that are read stand in `parse_config`.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _name_or_path
    add_cross_attention alibi_bias_max architectures attention_dropout attention_layer_norm_with_affine attention_probs_dropout_prob
    auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cls_token_id cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embedding_dropout encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task flash_attention forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout hidden_dropout_prob id2label init_cutoff_factor init_device init_fn init_std
    initializer_range is_decoder is_encoder_decoder label2id length_penalty mask_token_id max_length max_window_layers
    min_length mlp_ratio model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id precision prefix pretraining_tp problem_type
    pruned_heads remove_invalid_values repetition_penalty residual_dropout return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k
    top_p torch_dtype torchscript transformers_version typical_p unk_token_id use_bfloat16 use_cache
    """.split()  # noqa: SIM905 (a list would take a line each)
)
# {key: its only value that this network computes}; null means it where the value is false.
_LLADA_ONLY = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}
_LLAMA_ONLY = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
}


def parse_config(config: dict[str, Any], layout: Layout, folder: Path) -> ModelConfig:
    """ModelConfig of a config.json, refusing what this network cannot express instead of dropping it."""
    file = folder / "config.json"
    if layout == "ours":
        known = {f.name for f in fields(ModelConfig)}
        unknown = sorted(set(config) - known - {"model_type"})
        if unknown:
            raise UserError(f"{file}: unknown keys {unknown}")
        settings = {k: v for k, v in config.items() if k in known}
        if "rope_scaling" in settings:
            scaling = settings["rope_scaling"]
            require(
                isinstance(scaling, dict), f"model.rope_scaling must hold settings, not {shorten(scaling)}"
            )
            settings["rope_scaling"] = from_dict(RopeScaling, scaling, "model.rope_scaling.")
        return ModelConfig(**settings)
    values = _Values(config, file)
    is_llada = layout == "llada"
    max_length = values.pop("max_sequence_length" if is_llada else "max_position_embeddings")
    theta, scaling = read_rope(
        {key: values.pop(key, None) for key in ROPE_KEYS},
        file,
        default_theta=None if is_llada else 10_000.0,
        max_length=max_length,
        can_scale=not is_llada,
    )
    shared: dict[str, Any] = {
        "max_length": max_length,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "eos_token_id": next(iter(_as_ids(config.get("eos_token_id"), file)), None),
        "pad_token_id": config.get("pad_token_id"),
    }
    if is_llada:
        values.allow_only(_LLADA_ONLY)
        tied = values.pop("weight_tying")
        if values.pop("tie_word_embeddings", tied) != tied:
            raise UserError(
                f"{file}: weight_tying = {tied} and tie_word_embeddings = {not tied} contradict each other"
            )
        heads, rows = values.pop("n_heads"), values.pop("vocab_size")
        kv_heads = values.pop("n_kv_heads", None)
        if values.pop("multi_query_attention", None):
            if kv_heads not in (None, 1):
                raise UserError(
                    f"{file}: multi_query_attention and n_kv_heads = {kv_heads} contradict each other"
                )
            kv_heads = 1
        d_model = values.pop("d_model")
        parsed = ModelConfig(
            vocab_size=values.pop("embedding_size", None) or rows,
            d_model=d_model,
            num_layers=values.pop("n_layers"),
            num_heads=heads,
            num_kv_heads=heads if kv_heads is None else kv_heads,
            ffn_dim=values.pop("mlp_hidden_size", None) or config["mlp_ratio"] * d_model,
            rms_norm_eps=values.pop("rms_norm_eps", 1e-5),
            tie_embeddings=tied,
            qkv_bias=bool(values.pop("include_qkv_bias", False)),
            mask_token_id=config.get("mask_token_id"),
            **shared,
        )
    else:
        values.allow_only(_LLAMA_ONLY)
        family = _family(config["model_type"])
        assert family is not None
        if config["model_type"] == "Dream" and config.get("architectures", ["DreamModel"]) != ["DreamModel"]:
            # Others of that type have no shift, and no biases.
            raise UserError(
                f"{file}: architectures = {config['architectures']} is not supported, only DreamModel"
            )
        if family.qkv_bias or family.qk_norm:
            values.pop(
                "sliding_window", None
            )  # of no effect without use_sliding_window, which is not allowed
        if set(values.pop("layer_types", None) or ()) - {"full_attention"}:
            raise UserError(
                f"{file}: layer_types = {config['layer_types']} is not supported, only full_attention"
            )
        heads, d_model = values.pop("num_attention_heads"), values.pop("hidden_size")
        width = values.pop("head_dim", None) or family.head_dim
        parsed = ModelConfig(
            vocab_size=values.pop("vocab_size"),
            d_model=d_model,
            num_layers=values.pop("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=values.pop("num_key_value_heads", None) or heads,
            ffn_dim=values.pop("intermediate_size"),
            rms_norm_eps=values.pop("rms_norm_eps", family.rms_norm_eps),
            tie_embeddings=values.pop("tie_word_embeddings", False),
            causal=family.causal,
            head_width=width if width is not None and width * heads != d_model else None,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            shift=family.shift,
            mask_token_id=config.get("mask_token_id", family.mask_token_id),
            **shared,
        )
    values.refuse_rest()
    return parsed


class _Values:
    """The keys of a config.json that nobody has asked for yet."""

    def __init__(self, config: dict[str, Any], file: Path) -> None:
        self._rest = {key: value for key, value in config.items() if key not in _HARMLESS}
        self._file = file

    def pop(self, key: str, *default: Any) -> Any:
        return self._rest.pop(key, *default)

    def allow_only(self, allowed: dict[str, Any]) -> None:
        for key, value in allowed.items():
            found = self.pop(key, value)
            if found != value and not (found is None and value is False):
                raise UserError(f"{self._file}: {key} = {found!r} is not supported, only {value!r}")

    def refuse_rest(self) -> None:
        for key, value in self._rest.items():
            if value not in (None, False, 0, "", [], {}):
                raise UserError(
                    f"{self._file}: {key} = {shorten(value)} is not known here, and may change what the network computes; "
                    "remove the key if it does not"
                )


def _as_ids(ids: Any, file: Path) -> tuple[int, ...]:
    """The ids of eos_token_id: one, a list, or null."""
    found = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
        raise UserError(f"{file}: eos_token_id = {shorten(ids)} is neither an id nor a list of ids")
    return tuple(found)


def read_end_ids(folder: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """All ids that end a text by the folder's config.json and generation_config.json, the config's EOS first.

    Raises UserError for a damaged file, and for an id without a row in the vocabulary.
    """
    ends: list[int] = []
    for name in ("config.json", "generation_config.json"):
        file = Path(folder) / name
        if file.is_file():
            ends += _as_ids(read_object(file).get("eos_token_id"), file)
            for token in ends:
                if not 0 <= token < config.vocab_size:
                    raise UserError(
                        f"{file}: eos_token_id {token} lies outside the {config.vocab_size} vocabulary rows"
                    )
    return tuple(dict.fromkeys(ends))


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file's object. Raises UserError naming it."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: not a JSON object")
    return raw


def format_config(config: ModelConfig, layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a folder in this layout."""
    if layout == "ours":
        return {"model_type": OUR_MODEL_TYPE, **config.content()}
    if config.block_length is not None:
        raise UserError(
            f"a block-causal network (block_length {config.block_length}) has no place in the layout {layout}: keep it in ours"
        )
    torch_dtype = str(dtype).removeprefix("torch.")
    if layout == "llama":
        found = [
            name
            for name, family in FAMILIES.items()
            if (family.causal, family.qkv_bias, family.qk_norm, family.shift)
            == (config.causal, config.qkv_bias, config.qk_norm, config.shift)
        ]
        if not found:
            raise UserError(
                "no network with standard tensor names is known with these of causal, qkv_bias, qk_norm and shift: keep it in "
                "our layout"
            )
        return {
            "architectures": [FAMILIES[found[0]].architecture],
            "model_type": found[0],
            "hidden_act": "silu",
            "hidden_size": config.d_model,
            "intermediate_size": config.ffn_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_length,
            **write_rope(config.rope_theta, config.rope_scaling),
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
    if config.qk_norm or config.shift or config.head_width is not None or config.rope_scaling.kind != "none":
        raise UserError(
            "qk_norm, shift, head_width and rope_scaling have no place in LLaDA's layout: convert it with --layout llama or "
            "ours"
        )
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
        "include_qkv_bias": config.qkv_bias,
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
    raw = read_object(path)
    layout = detect_layout(raw, Path(folder))
    try:
        return parse_config(raw, layout, Path(folder)), layout
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: incomplete or malformed ({error})") from error
    except UserError as error:
        if str(folder) in str(error):
            raise
        raise UserError(f"{path}: {error}") from None  # a limit of ModelConfig, which knows no file
