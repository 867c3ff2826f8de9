"""Settings as frozen dataclasses: read strictly from plain values, written as JSON, checked when they are made.

A settings class checks itself in `__post_init__`: single fields by their limits (`limited`, `check_limits`), what must
hold between fields with `require`. A field is explained by the docstring below it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import math
import numbers
import operator
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from llada.errors import UserError, hint
from llada.files import read_bytes
from llada.store_errors import StoreError

T = TypeVar("T")


def require(holds: bool, message: str) -> None:
    """Raise UserError with `message` (the setting, what it must be, what it is) unless `holds`."""
    if not holds:
        raise UserError(message)


def to_json(settings: Any) -> str:
    """A settings object as JSON text."""
    return json.dumps(asdict(settings), indent=2)


def from_json(kind: type[T], text: str) -> T:
    """The inverse of `to_json`."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError("settings are a JSON object")
    return from_dict(kind, values)


def from_dict(kind: type[T], values: dict[str, Any], path: str = "") -> T:
    """Settings from plain values.

    Raises:
        UserError: an unknown key (naming the nearest), a missing one, or a value of the wrong type, with its path.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"unknown setting {path}{key}; {hint(key, fields)}")
    parsed = {key: _parse(hints[key], value, f"{path}{key}") for key, value in values.items()}
    for name, field in fields.items():
        has_default = (
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        )
        if name not in parsed and not has_default:
            raise UserError(f"missing setting {path}{name}")
    return kind(**parsed)


def load_text(url: str | Path, noun: str) -> str:
    """A settings file at any fsspec URL. Raises UserError naming the file, which is called a `noun`."""
    try:
        return read_bytes(str(url)).decode()
    except FileNotFoundError:
        raise UserError(f"cannot read the {noun} {url}: No such file or directory") from None
    except StoreError as error:
        raise UserError(f"cannot read the {noun} {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the {noun} {url} is not UTF-8 text: {error.reason}") from None


def load_yaml(url: str | Path, noun: str) -> dict[str, Any]:
    """The settings in a YAML file; an empty one holds none. Raises UserError naming the file, which is called a `noun`."""
    documents = parse_yaml(load_text(url, noun), str(url))
    if len(documents) > 1 or not all(isinstance(values, dict) for values in documents):
        raise UserError(f"{url} must hold 'key: value' lines")
    return documents[0] if documents else {}


def parse_yaml(text: str, place: str) -> list[Any]:
    """The documents of a YAML text, without empty ones. Raises UserError naming the `place`, also for a key that is given
    twice, of which YAML's usual readers silently take the last."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: list[Any] = []
            for key, _ in node.value:
                line = key.start_mark.line + 1
                require(key.value not in seen, f"{place}, line {line}: {shorten(key.value)} is given twice")
                seen.append(key.value)
            return super().construct_mapping(node, deep)

    try:
        return [document for document in yaml.load_all(text, Strict) if document is not None]
    except yaml.YAMLError as error:
        raise UserError(f"{place} is not YAML: {' '.join(str(error).split())}") from None


def _parse(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{path} must hold settings, not {value!r}")
        return from_dict(typing.cast(type, kind), value, f"{path}.")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        nested = [option for option in args if dataclasses.is_dataclass(option)]
        if isinstance(value, dict) and len(nested) == 1:
            return _parse(nested[0], value, path)  # whose own errors say more than the union's
        for option in args:
            try:
                return _parse(option, value, path)
            except UserError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
    elif origin is dict:
        if isinstance(value, dict):
            return {
                _parse_key(args[0], key, path): _parse(args[1], item, f"{path}.{key}")
                for key, item in value.items()
            }
    elif origin is tuple:
        if isinstance(value, list | tuple) and (args[-1] is Ellipsis or len(args) == len(value)):
            kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
            return tuple(
                _parse(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
            )
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        # 10 stays 10, so that settings which have been written and read again are spelled, and hashed, as they were.
        if _is_finite(value) or isinstance(value, float):
            return value
    elif type(value) is kind or kind is type(value):
        return value
    raise UserError(f"{path} must be {describe_kind(kind)}, not {value!r}")


def _parse_key(kind: Any, key: Any, path: str) -> Any:
    """A key of a mapping; JSON writes integers as text."""
    if int in _options(kind) and isinstance(key, str) and key.isdecimal() and key.isascii():
        return int(key)
    return _parse(kind, key, f"a key of {path}")


def describe_kind(kind: Any) -> str:
    """A type as a user writes it: "int or null", "one of a, b", "(int, float)"."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"({', '.join('...' if part is Ellipsis else describe_kind(part) for part in args)})"
    if _is_union(kind):
        return " or ".join(describe_kind(option) for option in args)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    return "null" if kind is type(None) else str(getattr(kind, "__name__", kind))


def merge_settings(defaults: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`defaults` with `changes` laid over them, setting by setting."""
    merged = dict(defaults)
    for key, value in changes.items():
        default = merged.get(key)
        if isinstance(default, dict) and isinstance(value, dict):
            value = merge_settings(default, value)
        merged[key] = value
    return merged


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of settings within settings."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# --- Limits and documentation of single fields ------------------------------------------------------------------------


def limited(
    default: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    **metadata: Any,
) -> Any:
    """A dataclass field whose values `check_limits` keeps in [low, high], or in (above, below); None is always allowed.
    In a tuple they hold for every number.

    Further keywords become the field's metadata.
    """
    limits = {"low": low, "above": above, "high": high, "below": below}
    described = {name: limit for name, limit in limits.items() if limit is not None}
    return dataclasses.field(default=default, metadata={**described, **metadata})


_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "high": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def check_limits(settings: Any, name: str) -> None:
    """Raise UserError for the first field that is no number where its type is one, outside its limits (see `limited`), or
    outside the values of its Literal type; `name` is what the settings are called."""
    for field_name, choices in _choices(settings.__class__).items():
        value = getattr(settings, field_name)
        if value not in choices:
            raise UserError(
                f"{name}: {field_name} must be one of {', '.join(map(str, choices))}, not {value!r}"
            )
    numeric, tuples = _numeric(settings.__class__), _tuples(settings.__class__)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in numeric and not _is_of(value, numeric[field.name]):
            described = describe_kind(numeric[field.name])
            raise UserError(f"{name}: {field.name} must be {described}, not {shorten(value)}")
        if field.name in tuples:
            _parse(tuples[field.name], value, f"{name}: {field.name}")
        for single in _single_values(value):
            if not _is_finite(single):
                raise UserError(f"{name}: {field.name} must be a finite number, not {shorten(single)}")
            for limit, (holds, words) in _LIMITS.items():
                if (
                    single is not None
                    and limit in field.metadata
                    and not holds(single, field.metadata[limit])
                ):
                    raise UserError(
                        f"{name}: {field.name} must be {words} {field.metadata[limit]}, not {shorten(single)}"
                    )


def _single_values(value: Any) -> Iterator[Any]:
    """The value, or those in a tuple of tuples."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _single_values(item)
    else:
        yield value


def shorten(value: object) -> str:
    """A value as an error quotes it: Python's spelling, cut where it is long."""
    try:
        spelled = repr(value)
    except ValueError:  # Python spells no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return spelled if len(spelled) <= 80 else f"{spelled[:77]}..."


# What a value of such a field is an instance of: numbers of other libraries are numbers too.
_NUMERIC: dict[type, type] = {
    bool: bool,
    int: numbers.Integral,
    float: numbers.Real,
    type(None): type(None),
}


def _is_of(value: object, annotation: Any) -> bool:
    """Whether a value belongs into a field of this numeric type; a bool is no number."""
    kinds = _options(annotation)
    return any(isinstance(value, _NUMERIC[k]) and isinstance(value, bool) == (k is bool) for k in kinds)


def _is_finite(value: object) -> bool:
    """False for an infinity, a NaN, and an integer that no float can hold."""
    if not isinstance(value, numbers.Real):
        return True
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@functools.cache
def _numeric(kind: type) -> dict[str, Any]:
    """{field: its type} of the fields whose type is a number, or one that may be None."""
    return {
        name: annotation
        for name, annotation in typing.get_type_hints(kind).items()
        if all(option in _NUMERIC for option in _options(annotation))
    }


@functools.cache
def _tuples(kind: type) -> dict[str, Any]:
    """{field: its type} of the fields that are tuples of numbers, or of such tuples."""

    def is_of_numbers(annotation: Any) -> bool:
        parts = [part for part in typing.get_args(annotation) if part is not Ellipsis]
        return typing.get_origin(annotation) is tuple and all(
            part in (int, float) or is_of_numbers(part) for part in parts
        )

    hints = typing.get_type_hints(kind)
    return {name: annotation for name, annotation in hints.items() if is_of_numbers(annotation)}


@functools.cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """{field: its values} of the fields whose type is a Literal, or one that may be None."""
    choices: dict[str, tuple[Any, ...]] = {}
    for name, annotation in typing.get_type_hints(kind).items():
        options = _options(annotation)
        values = [typing.get_args(o) if typing.get_origin(o) is typing.Literal else None for o in options]
        if any(values) and all(v or o is type(None) for v, o in zip(values, options, strict=True)):
            choices[name] = tuple(value for group in values for value in group or (None,))
    return choices


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(annotation) if _is_union(annotation) else (annotation,)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """{field: the docstring below it} of a settings class, on one line each."""
    docs: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        docs |= _own_field_docs(base)
    return docs


def _own_field_docs(kind: type) -> dict[str, str]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            value = below.value if isinstance(below, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docs[field.target.id] = " ".join(value.value.split())
    return docs
