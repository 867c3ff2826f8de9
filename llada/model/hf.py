"""Checkpoint folders: ours, the official GSAI-ML/LLaDA layout, and standard tensor names (iLLaDA, Llama, Qwen2, Qwen3).

A folder is `config.json` plus `model.safetensors` (or shards and `model.safetensors.index.json`), plus the
tokenizer's files if it has any. Loading fails on any missing, unused or mis-shaped tensor and names it: transformers 5
silently re-initialised 226 of iLLaDA's 291 tensors.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llada.errors import UserError
from llada.files import exists, filesystem, join, write_bytes, writing
from llada.model.adapt import diffusion_start, start_state
from llada.model.hf_config import (
    Layout,
    MissingCheckpointError,
    format_config,
    read_config,
    read_end_ids,
    read_object,
)
from llada.model.initial import Rows
from llada.model.lora import MergedWeights
from llada.model.transformer import ModelConfig, Transformer
from llada.settings import require

SHARD_BYTES = 5 * 1024**3

# ours -> theirs. `{}` stands for the layer number. Beware: in LLaDA's layout `ff_out` names both the head and
# every block's down-projection, and `ff_proj` is the gate.
LAYER_NAMES: dict[Layout, dict[str, str]] = {
    "llada": {
        "attn_norm": "attn_norm",
        "q_proj": "q_proj",
        "k_proj": "k_proj",
        "v_proj": "v_proj",
        "q_norm": "q_norm",
        "k_norm": "k_norm",
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
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
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
    layer = [
        (name, "weight")
        for name in LAYER_NAMES["llada"]
        if config.qk_norm or name not in ("q_norm", "k_norm")
    ]
    if config.qkv_bias:
        layer += [(name, "bias") for name in ("q_proj", "k_proj", "v_proj")]
    names: dict[str, str] = {}
    for name in top:
        theirs = name if layout == "ours" else TOP_NAMES[layout][name]
        names[f"{name}.weight"] = f"{theirs}.weight"
    for i in range(config.num_layers):
        for name, kind in layer:
            ours = f"layers.{i}.{name}.{kind}"
            theirs = (
                ours if layout == "ours" else f"{LAYER_PREFIX[layout]}{i}.{LAYER_NAMES[layout][name]}.{kind}"
            )
            names[ours] = theirs
    return names


def open_state(folder: str | Path, config: ModelConfig, layout: Layout) -> dict[str, Rows]:
    """Our parameter names -> tensors in the folder's safetensors, of which only the rows that are asked for are read.

    Raises:
        UserError: missing, unused or mis-shaped tensors, each named.
    """
    folder = Path(folder)
    stored: dict[str, tuple[Path, Any]] = {}
    for file in _weight_files(folder):
        with _open_weights(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in stored:
                    raise UserError(
                        f"{folder}: tensor {name} stands in {stored[name][0].name} and {file.name}"
                    )
                stored[name] = file, handle.get_slice(name)
    names = tensor_names(config, layout)
    tied_copy = tensor_names(_untied(config), layout)["lm_head.weight"] if config.tie_embeddings else None
    missing = sorted(set(names.values()) - set(stored))
    unused = sorted(set(stored) - set(names.values()) - {tied_copy})
    if missing or unused:
        raise UserError(f"{folder}: missing tensors {missing or 'none'}; unused tensors {unused or 'none'}")
    shapes = {name: p.shape for name, p in _meta_network(config).named_parameters()}
    state: dict[str, Rows] = {}
    for ours, theirs in names.items():
        _, tensor = stored[theirs]
        if tensor.get_dtype() not in ("F16", "BF16", "F32", "F64"):
            raise UserError(
                f"{folder}: tensor {theirs} is {tensor.get_dtype()}; quantised weights are not supported, only floating "
                "point of 16 bits or more"
            )
        if tuple(tensor.get_shape()) != tuple(shapes[ours]):
            raise UserError(
                f"{folder}: tensor {theirs} has shape {tuple(tensor.get_shape())}, "
                f"the config asks for {tuple(shapes[ours])}"
            )
        state[ours] = tensor
    if tied_copy in stored and not torch.equal(stored[tied_copy][1][:], state["embed.weight"][:]):
        raise UserError(f"{folder}: embeddings are tied but {tied_copy} differs from the embedding")
    return state


def load_state(folder: str | Path, config: ModelConfig, layout: Layout) -> dict[str, Tensor]:
    """Our parameter names -> tensors. Raises UserError as `open_state`."""
    return {name: tensor[:] for name, tensor in open_state(folder, config, layout).items()}


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
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise UserError(f"{index} is damaged (it has no weight_map): copy or download it again")
        shards = sorted(set(weight_map.values()))
    else:
        shards = ["model.safetensors"]
    for shard in shards:
        if not (folder / shard).is_file():
            raise MissingCheckpointError(f"{folder}: weight file {shard} is missing")
    return [folder / shard for shard in shards]


def _untied(config: ModelConfig) -> ModelConfig:
    return replace(config, tie_embeddings=False)


def _meta_network(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def load_model(
    folder: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> Transformer:
    """The network of a local checkpoint folder in any layout, in evaluation mode.

    Args:
        device: where to put it; None means CPU.
        dtype: None keeps the file's, where it holds several (norms in float32 beside matrices in bfloat16) the widest.

    Raises UserError: a device that there is not, a precision that weights cannot have, no checkpoint, or a damaged one.
    """
    dtype, place = find_dtype(dtype), find_device(device)
    config, layout = read_config(folder)
    state = load_state(folder, config, layout)
    model = _meta_network(config)
    model.end_ids = read_end_ids(folder, config)
    dtype = dtype or reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    state = {name: tensor.to(device=place, dtype=dtype) for name, tensor in state.items()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["embed.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    return model.eval()


_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "fp64": torch.float64,
    "float64": torch.float64,
    "double": torch.float64,
}


def find_device(name: torch.device | str | None) -> torch.device:
    """A device by its name; None: the CPU. Raises UserError for one that is not there."""
    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        raise UserError(f"device {str(name)!r} is none that there is; try cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"there is no device {device} on this machine; it has {torch.cuda.device_count()} of CUDA"
        )
    return device


def find_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """The precision of weights by its usual names. Raises UserError for one that weights cannot have."""
    dtype = _DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else name
    if name is not None and dtype not in _DTYPES.values():
        raise UserError(f"dtype {str(name)!r} is none that weights have; try bfloat16, float16 or float32")
    return dtype


def save_state(
    url: str | Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    layout: Layout = "ours",
    end_ids: Sequence[int] = (),
) -> None:
    """Write a checkpoint folder: weights first, config.json last (a folder without it is no checkpoint).

    `state` maps our parameter names to full tensors; a tied head is written once, as the embedding. Several `end_ids`, for
    which config.json has no place, stand in generation_config.json.
    """
    files = plan_files(config, layout, {name: tensor.element_size() for name, tensor in state.items()})
    for file in files:
        write_weights(file, url, {theirs: state[ours] for theirs, ours in file.names.items()})
    describe_weights(files, url, config, next(iter(state.values())).dtype, layout=layout, end_ids=end_ids)


@dataclass(frozen=True)
class WeightFile:
    """One of a checkpoint's safetensors files."""

    name: str
    names: dict[str, str]
    """The layout's tensor names -> our parameter names, in their order."""
    size: int
    """Bytes of the tensors."""


def plan_files(config: ModelConfig, layout: Layout, element_sizes: Mapping[str, int]) -> list[WeightFile]:
    """The files of a checkpoint, each of SHARD_BYTES at most or of one tensor, whose elements have so many bytes."""
    shapes = {name: p.shape for name, p in _meta_network(config).named_parameters()}
    shards: list[dict[str, str]] = [{}]
    sizes = [0]
    for ours, theirs in tensor_names(config, layout).items():
        nbytes = shapes[ours].numel() * element_sizes[ours]
        if shards[-1] and sizes[-1] + nbytes > SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        shards[-1][theirs] = ours
        sizes[-1] += nbytes
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    return [WeightFile(*file) for file in zip(names, shards, sizes, strict=True)]


def write_weights(file: WeightFile, url: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of the checkpoint folder `url` from its tensors, by the layout's names."""
    plain = {name: tensors[name].detach().contiguous().cpu() for name in file.names}
    with writing(join(str(url), file.name)) as path:
        save_file(plain, path, metadata={"format": "pt"})


def describe_weights(
    files: Sequence[WeightFile],
    url: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    layout: Layout = "ours",
    end_ids: Sequence[int] = (),
) -> None:
    """Complete the checkpoint folder of these files (see `save_state`)."""
    texts: dict[str, Any] = dict.fromkeys(("model.safetensors.index.json", "generation_config.json"))
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in file.names}
        total = sum(file.size for file in files)
        texts["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    if len(end_ids) > 1:
        texts["generation_config.json"] = {"eos_token_id": list(end_ids)}
    for name, text in texts.items():
        place = join(str(url), name)
        if text is not None:
            write_bytes(place, (json.dumps(text, indent=2) + "\n").encode())
        elif exists(place):  # of an earlier checkpoint here
            fs, path = filesystem(place)
            fs.rm(path)
    described = format_config(config, layout, dtype)
    write_bytes(join(str(url), "config.json"), (json.dumps(described, indent=2) + "\n").encode())


def save_model(model: Transformer, folder: str | Path, *, layout: Layout = "ours") -> None:
    """Write an unsharded network as a checkpoint folder."""
    save_state(folder, dict(model.state_dict()), model.config, layout=layout, end_ids=model.end_ids)


TOKENIZER_FILES = re.compile(r"(tokenizer.*|special_tokens_map|added_tokens|vocab|merges|chat_template)\.\w+")


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: Layout | None = None,
    mask_token_id: int | None = None,
    mask_noise: float = 1.0,
    seed: int = 0,
    shift: bool = False,
    adapters: tuple[Mapping[str, Tensor], float] | None = None,
) -> ModelConfig:
    """Rewrite a checkpoint folder in another layout, bit for bit.

    Args:
        adapters: merged into the weights (`MergedWeights`): the matrices, and what their product counts.
        layout: of the target. None: ours, or LLaDA's if the source is already ours.
        mask_token_id: turns an autoregressive checkpoint into the start of a masked-diffusion one: attention becomes
            bidirectional, and this row of the vocabulary the mask, of mean and noise where there was none; with the first
            id behind the vocabulary, this grows (adapt.py).
        mask_noise, seed: of that row, see `start_state`.
        shift: predict a position from the one before it, as the autoregressive network did.

    Raises:
        UserError: `target` is `source` (whose files are being read while the target is written), or what loading refuses.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise UserError(f"cannot convert {source} onto itself: choose another output folder")
    config, source_layout = read_config(source)
    if layout is None:
        layout = "ours" if source_layout != "ours" else ("llama" if config.causal else "llada")
    state, end_ids = load_state(source, config, source_layout), read_end_ids(source, config)
    if adapters is not None:
        state = dict(MergedWeights(state, *adapters))
    if mask_token_id is not None:
        require(
            0 <= mask_token_id <= config.vocab_size,
            f"{source}: mask_token_id {mask_token_id} lies outside the {config.vocab_size} vocabulary rows, and is not the "
            f"first behind them, {config.vocab_size}",
        )
        start = diffusion_start(
            config, mask_token_id, block_length=config.block_length, shift=config.shift or shift
        )
        rows = start_state(state, config, start, mask_noise=mask_noise, seed=seed)
        state, config = {name: tensor[:] for name, tensor in rows.items()}, start
    save_state(target, state, config, layout=layout, end_ids=end_ids)
    for file in Path(source).iterdir():
        if TOKENIZER_FILES.fullmatch(file.name):
            shutil.copy2(file, Path(target) / file.name)
    return config
