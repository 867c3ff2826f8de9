"""The rotary positions in a config.json of transformers, read strictly and written.

Their base stands in `rope_theta` or, in newer versions, with the scaling: `rope_parameters`, before that `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llada.errors import UserError
from llada.model.rotary import UNSCALED, RopeScaling
from llada.settings import shorten

ROPE_KEYS = ("rope_theta", "rope_parameters", "rope_scaling")

# transformers' names -> ours.
_NAMES = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
# {setting: its only value that is computed here}
_ONLY = {"partial_rotary_factor": 1.0, "truncate": True}
_KINDS = ("linear", "llama3", "yarn")


def read_rope(
    rope: Mapping[str, Any], file: Path, *, default_theta: float | None, max_length: int, can_scale: bool
) -> tuple[float, RopeScaling]:
    """Base and scaling of the rotary positions by a config's ROPE_KEYS, wherever transformers' versions have put them.

    Args:
        file: is named in errors.
        max_length: the context, which is the original one where none is said.
        can_scale: whether those who compute this layout scale.

    Raises:
        UserError: a scaling that is unknown here, is incomplete, or says two things.
        KeyError: no base, and no `default_theta`.
    """
    thetas = {"rope_theta": rope["rope_theta"]}
    scalings: dict[str, RopeScaling] = {}
    for name in ("rope_parameters", "rope_scaling"):
        settings = dict(rope[name] or {})
        thetas[f"{name}.rope_theta"] = settings.pop("rope_theta", None)
        if settings:
            what = f"{file}: {name} = {shorten(rope[name])}"
            scalings[name] = _read_scaling(settings, what, max_length)
            if scalings[name] != UNSCALED and not can_scale:
                raise UserError(f"{what}: scaled rotary positions are not supported in this layout")
    stated = {name: theta for name, theta in thetas.items() if theta is not None}
    if len(set(stated.values())) > 1:
        raise UserError(
            f"{file}: {' and '.join(f'{n} = {t}' for n, t in stated.items())} contradict each other"
        )
    if len(set(scalings.values())) > 1:
        raise UserError(f"{file}: rope_parameters and rope_scaling contradict each other")
    if not stated and default_theta is None:
        raise KeyError("rope_theta")
    return next(iter(stated.values()), default_theta), next(iter(scalings.values()), UNSCALED)  # type: ignore[return-value]


def _read_scaling(settings: dict[str, Any], what: str, max_length: int) -> RopeScaling:
    """The scaling by these settings, without their base; `what` begins errors."""
    kinds = {settings.pop(key, None) for key in ("rope_type", "type")} - {None}
    kind: Any = kinds.pop() if len(kinds) == 1 else None if kinds else "default"
    said = {key: value for key, value in settings.items() if value is not None and value != _ONLY.get(key)}
    if kind == "default" and all(value in (1, 1.0) for value in said.values()):
        return UNSCALED
    if kind not in _KINDS or not said.keys() <= _NAMES.keys():
        raise UserError(
            f"{what}: these scaled rotary positions are not supported, only {', '.join(_KINDS)} with any of "
            f"{', '.join(_NAMES)}"
        )
    if kind != "linear":
        said.setdefault("original_max_position_embeddings", max_length)
    try:
        return RopeScaling(kind=kind, **{_NAMES[key]: value for key, value in said.items()})
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def write_rope(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    """What a config.json says of the rotary positions, as every version of transformers reads it."""
    if scaling.kind == "none":
        return {"rope_theta": theta}
    content = scaling.content()
    stretched = {key: content[name] for key, name in _NAMES.items() if name in content}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": scaling.kind, **stretched}}
