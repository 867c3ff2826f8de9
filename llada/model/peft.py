"""Adapters as folders of the peft library: adapter_config.json beside adapter_model.safetensors.

The tensors are named after the base network's modules in the layout of its own folder, so that peft puts an adapter of ours
onto the model that transformers makes of that folder, and one that peft has made can be merged here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from llada.errors import UserError
from llada.model.hf import LAYER_PREFIX, _open_weights, tensor_names
from llada.model.hf_config import Layout, MissingCheckpointError, read_object
from llada.model.lora import TARGETS, LoraConfig, adapted_linears
from llada.model.transformer import ModelConfig
from llada.settings import shorten

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Of other ways to begin, which change the base's weights, an adapter says nothing that could be merged onto them.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# What says nothing about the product of the two matrices.
_HARMLESS = frozenset(
    """
    task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules exclude_modules
    lora_dropout layers_to_transform layers_pattern megatron_core eva_config qalora_group_size ensure_weight_tying
    """.split()  # noqa: SIM905 (a list would take a line each)
)


def save_adapter(
    folder: str | Path,
    adapters: Mapping[str, Tensor],
    config: LoraConfig,
    model: ModelConfig,
    *,
    layout: Layout,
    base: str,
) -> None:
    """Write an adapter folder.

    Args:
        adapters: `layers.<i>.<linear>.lora_A` (rank, in) and `.lora_B` (out, rank) -> tensor.
        model, layout, base: of the checkpoint folder that the adapter belongs to: its network, its layout, where it is.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = _modules(model, layout)
    tensors = {}
    for name, tensor in adapters.items():
        layer, matrix = name.rsplit(".", 1)
        tensors[f"{_PREFIX}{modules[layer]}.{matrix}.weight"] = tensor.detach().contiguous().cpu()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    assert config.rank is not None
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha or 2 * config.rank,
        "use_rslora": config.rslora,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(config, model, layout),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")


def _modules(model: ModelConfig, layout: Layout) -> dict[str, str]:
    """Our name of every module with a weight -> the layout's name of it."""
    names = tensor_names(model, layout)
    return {
        ours.removesuffix(".weight"): theirs.removesuffix(".weight")
        for ours, theirs in names.items()
        if ours.endswith(".weight")
    }


def _target_modules(config: LoraConfig, model: ModelConfig, layout: Layout) -> list[str] | str:
    """The last parts of the modules' names; where the head shares one of them, as in LLaDA's layout, a regular expression."""
    modules = _modules(model, layout)
    leaves = [modules[f"layers.0.{name}"].rsplit(".", 1)[-1] for name in TARGETS if name in config.targets]
    others = {theirs.rsplit(".", 1)[-1] for ours, theirs in modules.items() if not ours.startswith("layers.")}
    if not others & set(leaves):
        return leaves
    return rf"{re.escape(LAYER_PREFIX[layout])}\d+\.({'|'.join(leaves)})"


def load_adapter(folder: str | Path, model: ModelConfig, layout: Layout) -> tuple[dict[str, Tensor], float]:
    """The matrices of an adapter folder by our names (see `save_adapter`), and the scale of their product.

    Args:
        model, layout: of the checkpoint folder that it belongs to.

    Raises:
        UserError: it is no adapter of such a network, or one whose product is not the plain one.
    """
    folder = Path(folder)
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise MissingCheckpointError(f"{folder} is no adapter: it has no {CONFIG_FILE}")
    scale, rank = _read_scale(file)
    if not (folder / WEIGHTS_FILE).is_file():
        raise MissingCheckpointError(f"{folder}: weight file {WEIGHTS_FILE} is missing")
    with _open_weights(folder / WEIGHTS_FILE) as handle:
        found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    ours = {theirs: name for name, theirs in _modules(model, layout).items()}
    adapters: dict[str, Tensor] = {}
    for name, tensor in found.items():
        parsed = re.fullmatch(rf"{re.escape(_PREFIX)}(.*)\.(lora_[AB])\.weight", name)
        layer = ours.get(parsed[1]) if parsed else None
        if layer is None or layer.rsplit(".", 1)[-1] not in TARGETS:
            raise UserError(
                f"{folder}: tensor {name} belongs to no linear layer of a block of this network: "
                "is it an adapter of another one?"
            )
        adapters[f"{layer}.{parsed[2]}"] = tensor  # type: ignore[index]
    _check_shapes(folder, adapters, model, rank)
    return adapters, scale


def _read_scale(file: Path) -> tuple[float, int]:
    """The scale and the rank that an adapter_config.json tells of. Raises UserError for what changes the product."""
    values = {key: value for key, value in read_object(file).items() if key not in _HARMLESS}
    kind = values.pop("peft_type", None)
    if kind != "LORA":
        raise UserError(f"{file}: peft_type {kind!r} is not supported, only 'LORA'")
    rank, alpha, by_root = (
        values.pop("r", None),
        values.pop("lora_alpha", None),
        values.pop("use_rslora", False),
    )
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(f"{file} is damaged (r = {shorten(rank)}, lora_alpha = {shorten(alpha)})")
    start = values.pop("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{file}: init_lora_weights = {start!r} changes the base's weights, which the adapter does not hold: let peft "
            "merge it"
        )
    if values.get("bias") == "none":
        del values["bias"]
    for key, value in values.items():
        if value:
            raise UserError(
                f"{file}: {key} = {shorten(value)} is not supported, only the plain product of two matrices"
            )
    return alpha / (math.sqrt(rank) if by_root else rank), rank


def _check_shapes(folder: Path, adapters: Mapping[str, Tensor], model: ModelConfig, rank: int) -> None:
    if not adapters:
        raise UserError(f"{folder} has no matrices")
    for layer, (rows, columns) in adapted_linears(LoraConfig(rank=1), model).items():
        expected = {f"{layer}.lora_A": (rank, columns), f"{layer}.lora_B": (rows, rank)}
        missing = [name for name in expected if name not in adapters]
        if len(missing) == 1:
            raise UserError(f"{folder}: {missing[0]} is missing beside the other matrix")
        for name in () if missing else expected:
            if tuple(adapters[name].shape) != expected[name]:
                raise UserError(
                    f"{folder}: {name} has shape {tuple(adapters[name].shape)}, the network asks for {expected[name]}"
                )
