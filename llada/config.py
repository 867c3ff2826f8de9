"""One recipe, complete: what to prepare, learn, fine-tune and how to sample. Where it runs is not in it.

The dataclasses stand beside their consumers; here they are composed, written as JSON and read back strictly.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from llada.data.prepare import PrepareConfig
from llada.model.transformer import ModelConfig
from llada.sampling.sampler import SamplingConfig
from llada.training.trainer import RunConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """A preset: every stage's settings, made to go together."""

    model: ModelConfig
    prepare: PrepareConfig
    pretrain: RunConfig
    sft_prepare: PrepareConfig
    sft: RunConfig
    sampling: SamplingConfig


def to_json(config: Any) -> str:
    """Any of our configs as JSON text."""
    return json.dumps(asdict(config), indent=2)


def from_dict(kind: type[T], values: dict[str, Any], path: str = "") -> T:
    """A config dataclass from plain values.

    Raises:
        ValueError: an unknown key (naming the nearest), a missing one, or a value of the wrong type, with its path.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ValueError(f"unknown setting {path}{key}; {hint}")
    parsed = {key: _parse(hints[key], value, f"{path}{key}") for key, value in values.items()}
    try:
        return kind(**parsed)
    except TypeError as error:
        raise ValueError(f"{path or kind.__name__}: {error}") from None


def _parse(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{path} must hold settings, not {value!r}")
        return from_dict(typing.cast(type, hint), value, f"{path}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _parse(option, value, path)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple) and (args[-1] is Ellipsis or len(args) == len(value)):
            kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
            return tuple(
                _parse(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
            )
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif type(value) is hint or hint is type(value):
        return value
    raise ValueError(f"{path} must be {getattr(hint, '__name__', hint)}, not {value!r}")


def merge_settings(defaults: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`defaults` with `changes` laid over them, setting by setting."""
    merged = dict(defaults)
    for key, value in changes.items():
        held = merged.get(key)
        merged[key] = (
            merge_settings(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
        )
    return merged


def from_json(kind: type[T], text: str) -> T:
    """The inverse of `to_json`."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError("a config is a JSON object")
    return from_dict(kind, values)
