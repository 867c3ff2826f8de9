"""Settings: read strictly, with the place of what is wrong; limits; documentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from llada import presets
from llada.config import Recipe
from llada.errors import UserError
from llada.settings import (
    check_limits,
    field_docs,
    from_dict,
    from_json,
    limited,
    load_yaml,
    merge_settings,
    require,
    to_json,
)


@dataclass(frozen=True)
class Inner:
    """A part."""

    rate: float = limited(0.5, above=0, below=1)
    """Of the
    steps."""
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_limits(self, "inner")


@dataclass(frozen=True)
class Outer:
    """A whole."""

    size: int
    """How many."""
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    pairs: tuple[tuple[int, float], ...] = ()
    free: dict[str, Any] = field(default_factory=dict)
    limit: int | None = limited(None, low=1, high=9)

    def __post_init__(self) -> None:
        check_limits(self, "outer")
        require(self.limit is None or self.limit <= self.size, f"outer: limit {self.limit} above {self.size}")


def test_what_was_written_reads_back_equal() -> None:
    outer = Outer(3, "b", Inner(0.25, ("x",)), ((1, 2.0),), {"k": [1]}, 2)
    assert from_json(Outer, to_json(outer)) == outer
    assert from_dict(Outer, {"size": 1, "inner": {"rate": 0.5}}) == Outer(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 1, "inner": {"rat": 0.1}}, "unknown setting f: inner.rat; did you mean 'rate'"),
        ({"size": 1, "colour": 1}, "unknown setting f: colour; known: size, kind, inner, pairs, free, limit"),
        ({}, "missing setting f: size"),
        ({"size": True}, "f: size must be int, not True"),
        ({"size": "1"}, "f: size must be int, not '1'"),
        ({"size": 1, "kind": "c"}, "f: kind must be one of a, b, not 'c'"),
        ({"size": 1, "limit": "x"}, "f: limit must be int or null, not 'x'"),
        ({"size": 1, "inner": 3}, "f: inner must hold settings, not 3"),
        ({"size": 1, "inner": {"names": "xy"}}, r"f: inner.names must be"),
        ({"size": 1, "pairs": [[1]]}, r"f: pairs\[0\] must be"),
        ({"size": 1, "free": 3}, "f: free must be"),
        ({"size": 1, "inner": {"rate": 10**400}}, r"f: inner.rate must be float, not 1000"),
        ({"size": 1, "inner": {"rate": 0}}, "inner: rate must be above 0, not 0"),
        ({"size": 9, "limit": 0}, "outer: limit must be at least 1, not 0"),
        ({"size": 9, "limit": 10}, "outer: limit must be at most 9, not 10"),
        ({"size": 1, "limit": 2}, "outer: limit 2 above 1"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_with_its_place(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Outer, values, "f: ")


def test_numbers_must_be_finite() -> None:
    for rate in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="rate must be a finite number"):
            Inner(rate)


def test_json_that_is_none_is_said() -> None:
    for text in ("{", "[1]"):
        with pytest.raises(UserError):
            from_json(Outer, text)


def test_changes_are_laid_over_defaults_setting_by_setting() -> None:
    defaults = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    changes = {"b": {"d": {"e": 4}, "f": 5}}
    assert merge_settings(defaults, changes) == {"a": 1, "b": {"c": 2, "d": {"e": 4}, "f": 5}}
    assert defaults["b"] == {"c": 2, "d": {"e": 3}}


def test_a_field_is_explained_by_the_docstring_below_it() -> None:
    assert field_docs(Inner) == {"rate": "Of the steps."}
    assert field_docs(Outer) == {"size": "How many."}


@dataclass(frozen=True)
class Choices:
    colour: Literal["red", "green"] | None = None
    size: Literal[1, 2] = 1
    free: str | Literal[3] = ""

    def __post_init__(self) -> None:
        check_limits(self, "choices")


def test_a_literal_field_takes_its_values_alone() -> None:
    Choices("red", 2, "anything")
    for bad, message in (
        ({"colour": "blue"}, "choices: colour must be one of red, green, None, not 'blue'"),
        ({"size": 3}, "choices: size must be one of 1, 2, not 3"),
        ({"size": None}, "size must be one of 1, 2, not None"),
    ):
        with pytest.raises(UserError, match=message):
            Choices(**bad)


def test_a_yaml_file_is_read_or_named(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: 1\nb: {c: [x]}\n")
    assert load_yaml(file, "thing") == {"a": 1, "b": {"c": ["x"]}}
    file.write_text("# nothing\n")
    assert load_yaml(file, "thing") == {}
    for content, message in (
        (b"- a\n", "must hold 'key: value' lines"),
        (b"a: [", "is not YAML"),
        (b"\xff", "UTF-8"),
        (b"a: 1\n---\nb: 2\n", "must hold 'key: value' lines"),
        (b"a: 1\nb: {c: 1,\n  c: 2}\n", "line 3: 'c' is given twice"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_yaml(file, "thing")
    with pytest.raises(UserError, match=r"cannot read the thing .*none\.yaml: No such file"):
        load_yaml(tmp_path / "none.yaml", "thing")


def test_inherited_fields_keep_their_documentation() -> None:
    @dataclass(frozen=True)
    class Wider(Inner):
        size: int = 0
        """How many."""

    assert field_docs(Wider) == {"rate": "Of the steps.", "size": "How many."}


def test_a_fault_below_an_optional_part_is_named_there() -> None:
    @dataclass(frozen=True)
    class Whole:
        part: Inner | None = None

    assert from_dict(Whole, {"part": None}) == Whole()
    with pytest.raises(UserError, match=r"unknown setting part\.rat; did you mean 'rate'"):
        from_dict(Whole, {"part": {"rat": 0.1}})


def test_what_is_written_and_read_again_is_spelled_as_it_was():
    """Hashes are of the JSON: 10 and 10.0 would be two."""
    recipe = presets.tiny()
    text = to_json(recipe)
    assert to_json(from_json(Recipe, text)) == text
