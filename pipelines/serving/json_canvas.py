"""A JSON schema as a canvas: the frame (braces, names, commas) is given, the values are slots of allowed tokens.

So a reply is valid JSON and fits the schema whatever the network writes. What a canvas of a fixed length cannot promise is
refused by name: patterns of strings, arrays without a fixed number of items, a choice between objects, recursion. A value
shorter than its slot is filled up with the end-of-text token, which does not show in text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn
from urllib.parse import unquote

import torch

from llada.sampling.slots import Slot, Slots
from llada.sampling.token_bytes import TokenBytes
from pipelines.serving.errors import RequestError, shorten

_DIGITS = 8  # positions of a whole number, and of one before its point
_FRACTION = 4  # positions behind the point
_MAX_LISTED = 256  # whole numbers between bounds that are listed one by one
_MAX_STRING = 64  # positions of a string that has no limit of its own
_MAX_PARTS = 512  # of a frame
_MAX_SETS = 1024  # of tokens, each a row of the vocabulary's width
_MAX_WHERE = 1000  # characters of a place in the schema, by which nesting is bounded
_MAX_REFS = 32  # references, and alternatives of alternatives
_MAX_CHARS = 1 << 18  # of all listed values together
# What is said about some values does not concern others.
_OF_STRINGS = frozenset({"minLength", "maxLength", "pattern", "format"})
_OF_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_OF_KIND = {"string": _OF_STRINGS, "integer": _OF_NUMBERS, "number": _OF_NUMBERS}
_SAYS_NOTHING = {
    *("title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions"),
    *("deprecated", "readOnly", "writeOnly"),
}


class Vocabulary:
    """The sets of tokens that values are made of."""

    def __init__(
        self,
        token_bytes: TokenBytes,
        special: frozenset[int],
        size: int,
        fill: int,
        encode: Callable[[str], list[int]],
    ) -> None:
        """`fill`: a special token that stands for nothing; `encode`: text to ids."""
        self._bytes, self._special, self.size, self.fill, self.encode = (
            token_bytes,
            special,
            size,
            fill,
            encode,
        )
        # Most take a look at the whole vocabulary.
        self._sets: dict[tuple[int | bool, ...], frozenset[int]] = {}

    @cached_property
    def texts(self) -> dict[int, str]:
        """{id: its text} of the tokens that are whole characters."""
        found = {}
        for token in range(self.size):
            if token not in self._special and (raw := self._bytes[token]):
                try:
                    found[token] = raw.decode()
                except UnicodeDecodeError:
                    continue
        return found

    @cached_property
    def _in_strings(self) -> dict[int, int]:
        """{id: its characters} of what may stand between quotes as it is."""
        return {
            token: len(text)
            for token, text in self.texts.items()
            if not any(letter in '"\\' or letter < " " for letter in text)
        }

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token that may stand in a string."""
        return max(self._in_strings.values(), default=0)

    def in_string(self, max_chars: int | None, *, may_fill: bool) -> frozenset[int]:
        most = self._longest if max_chars is None else min(max_chars, self._longest)
        if (key := (most, may_fill)) not in self._sets:
            own = {token for token, length in self._in_strings.items() if length <= most}
            self._sets[key] = frozenset(own | ({self.fill} if may_fill else set()))
        return self._sets[key]

    def digits(self, *, begins: bool, may_fill: bool) -> frozenset[int]:
        """`begins`: no zero first."""
        if (key := (-1, begins, may_fill)) not in self._sets:
            own = {
                token
                for token, text in self.texts.items()
                if text.isascii() and text.isdigit() and not (begins and text[0] == "0")
            }
            self._sets[key] = frozenset(own | ({self.fill} if may_fill else set()))
        return self._sets[key]

    def single(self, token: int) -> frozenset[int]:
        if (key := (-2, token)) not in self._sets:
            self._sets[key] = frozenset([token])
        return self._sets[key]

    def one(self, letter: str) -> frozenset[int]:
        return frozenset(self.encode(letter)[:1])


Pattern = list[frozenset[int]]


@dataclass
class _Value:
    """A slot to be: the patterns of its alternatives, some of which are as long as the strings turn out to be."""

    patterns: list[Pattern] = field(default_factory=list)
    strings: list[tuple[int, int | None]] = field(default_factory=list)
    """(characters at least, at most) of each kind of string."""

    def length(self, string: int) -> int:
        """Positions of the longest alternative, with strings of so many between their quotes."""
        of_strings = [2 + (string if high is None else min(string, high)) for _, high in self.strings]
        return max([*map(len, self.patterns), *of_strings])


class JsonCanvas:
    """What stands where."""

    def __init__(
        self,
        schema: Mapping[str, Any],
        vocabulary: Vocabulary,
        max_tokens: int,
        limit_field: str = "max_tokens",
    ) -> None:
        """Raises RequestError 400 for what cannot be done, naming it and its place, and for fewer tokens than it takes.

        `limit_field`: what the client calls `max_tokens`.
        """
        self._words, self._root = vocabulary, schema
        self._parts: list[str | _Value] = []
        self._looked_at = self._listed = 0
        if schema.get("type") != "object" and "$ref" not in schema:
            _refuse("the schema's root", "must be an object")
        try:
            self._add(schema, "$", ())
        except RecursionError:
            _refuse("the schema", "has too many parts in each other")
        values = [part for part in self._parts if isinstance(part, _Value)]
        with_strings = [value for value in values if value.strings]
        least = max([1, *(low for value in with_strings for low, _ in value.strings)])
        needed = self._length(least)
        if needed > max_tokens:
            message = f"response_format: this schema takes {needed} tokens at the least, and {limit_field} is {max_tokens}"
            raise RequestError(400, message, param=limit_field)
        share = (max_tokens - needed) // len(with_strings) if with_strings else 0
        self._lay_out(min(least + share, max(least, _MAX_STRING)))

    def _length(self, string: int) -> int:
        """With strings of so many positions, which may be more than there is memory for."""
        return sum(
            len(self._words.encode(part)) if isinstance(part, str) else part.length(string)
            for part in self._pieces()
        )

    def _pieces(self) -> Iterator[str | _Value]:
        """Values, and the frame between them in one piece."""
        text = ""
        for part in self._parts:
            if isinstance(part, str):
                text += part
                continue
            if text:
                yield text
            text = ""
            yield part
        yield text

    def _laid(self, string: int) -> Iterator[list[Pattern]]:
        """The patterns of each piece, all of one length, with strings of so many positions. One of the frame has one."""
        for part in self._pieces():
            yield [self._literal(part)] if isinstance(part, str) else self._patterns(part, string)

    def _patterns(self, value: _Value, string: int) -> list[Pattern]:
        patterns = list(value.patterns)
        quote = self._words.one('"')
        for low, high in value.strings:
            length = string if high is None else min(string, high)
            most = None if high is None else high // length if length else 0
            inner = [self._words.in_string(most, may_fill=place >= low) for place in range(length)]
            patterns.append([quote, *inner, quote])
        fill = frozenset([self._words.fill])
        return [[*pattern, *[fill] * (value.length(string) - len(pattern))] for pattern in patterns]

    def _lay_out(self, string: int) -> None:
        self.fixed: dict[int, int | str] = {}
        numbers: dict[frozenset[int], int] = {}
        slots = []
        place = 0
        for patterns in self._laid(string):
            length = len(patterns[0])
            numbered = [tuple(numbers.setdefault(ids, len(numbers)) for ids in each) for each in patterns]
            if len(patterns) > 1:
                slots.append(Slot(place, tuple(numbered)))
            else:
                for at, (ids, number) in enumerate(zip(patterns[0], numbered[0], strict=True), start=place):
                    if len(ids) == 1:
                        self.fixed[at] = next(iter(ids))
                    else:
                        slots.append(Slot(at, ((number,),)))
            place += length
        if len(numbers) > _MAX_SETS:
            _refuse("the schema", "has too many different values")
        table = torch.zeros(len(numbers), self._words.size, dtype=torch.bool)
        for ids, number in numbers.items():
            table[number, list(ids)] = True
        self.length = place
        self.slots = Slots(table, slots)

    # --- Reading the schema -------------------------------------------------------------------------------------------

    def _add(self, schema: Any, where: str, refs: tuple[str, ...]) -> None:
        if len(where) > _MAX_WHERE:
            _refuse(where, "is nested too deeply, or has too long a name")
        if len(self._parts) > _MAX_PARTS:
            _refuse("the schema", "has too many parts")
        schema, refs = self._resolve(schema, where, refs)
        if schema.get("type") == "object":
            self._add_object(schema, where, refs)
        elif schema.get("type") == "array":
            self._add_array(schema, where, refs)
        else:
            value = _Value()
            self._add_value(schema, where, value, refs)
            self._parts.append(value)

    def _resolve(
        self, schema: Any, where: str, refs: tuple[str, ...]
    ) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        """The schema that a reference stands for, and the references on the way to it."""
        if not isinstance(schema, Mapping):
            _refuse(where, f"must be a schema, not {shorten(json.dumps(schema))}")
        while "$ref" in schema:
            ref = schema["$ref"]
            found: Any = self._root
            for name in str(ref).removeprefix("#/").split("/"):
                # A JSON pointer (RFC 6901) in the fragment of a URI.
                key = unquote(name).replace("~1", "/").replace("~0", "~")
                found = found.get(key) if isinstance(found, Mapping) else None
            if not str(ref).startswith("#/") or not isinstance(found, Mapping):
                _refuse(where, f"refers to {shorten(str(ref))!r}, which the schema does not hold")
            if ref in refs:
                _refuse(where, "refers to itself: a canvas has a fixed length")
            _check_keys(schema, {"$ref"}, where)
            schema, refs = found, (*refs, str(ref))
        return schema, refs

    def _add_object(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> None:
        _check_keys(schema, {"type", "properties", "required", "additionalProperties"}, where)
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        is_named = isinstance(required, list) and all(isinstance(name, str) for name in required)
        if not isinstance(properties, Mapping) or not is_named:
            _refuse(where, "has properties that are no object, or a required that is no list of names")
        if missing := [name for name in required if name not in properties]:
            _refuse(where, f"requires {shorten(str(missing[0]))!r}, of which it has no property")
        opening = "{"
        for name, inner in properties.items():
            self._parts.append(f"{opening}{json.dumps(name, ensure_ascii=False)}: ")
            self._add(inner, f"{where}.{name}", refs)
            opening = ", "
        self._parts.append("{}" if opening == "{" else "}")

    def _add_array(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> None:
        _check_keys(schema, {"type", "items", "minItems", "maxItems"}, where)
        count: Any = schema.get("minItems")
        if not _is_whole(count) or count != schema.get("maxItems") or count > _MAX_PARTS:
            _refuse(where, "is an array: a canvas needs a fixed number of items, minItems = maxItems")
        if "items" not in schema and count:
            _refuse(where, "is an array whose items have no schema")
        for number in range(count):
            self._parts.append(", " if number else "[")
            self._add(schema["items"], f"{where}[{number}]", refs)
        self._parts.append("]" if count else "[]")

    def _add_value(self, schema: Mapping[str, Any], where: str, value: _Value, refs: tuple[str, ...]) -> None:
        """The alternatives of something that is neither an object nor an array."""
        self._looked_at += 1
        too_many = self._looked_at > _MAX_PARTS * 8 or len(value.patterns) > 4 * _MAX_LISTED
        if len(refs) > _MAX_REFS or too_many:
            _refuse(where, "has too many alternatives")
        for name in ("anyOf", "oneOf"):
            if name in schema:
                _check_keys(schema, {name}, where)
                if not isinstance(schema[name], list) or not schema[name]:
                    _refuse(where, f"has a {name} that is no list of schemas")
                chosen = [self._resolve(option, where, refs) for option in schema[name]]
                if name == "oneOf" and not _are_apart([option for option, _ in chosen]):
                    _refuse(where, "has a oneOf whose options are not of different types: say anyOf")
                for option, further in chosen:
                    self._add_value(option, where, value, (*further, where))
                return
        if "const" in schema or "enum" in schema:
            _check_keys(schema, {"const", "enum", "type"}, where)
            options = [schema["const"]] if "const" in schema else schema["enum"]
            if not isinstance(options, list) or not options:
                _refuse(where, "has an enum that is no list of values")
            if len(options) > _MAX_LISTED:
                _refuse(where, f"has more than {_MAX_LISTED} values")
            kinds = schema.get("type", ())
            for option in options:
                in_enum = "const" not in schema or any(
                    _are_same(option, one) for one in schema.get("enum", [option])
                )
                if not in_enum or (kinds != () and not _is_one_of(option, kinds)):
                    _refuse(
                        where,
                        f"has the value {shorten(json.dumps(option))}, which its type or its enum does not have",
                    )
            texts = [json.dumps(option, ensure_ascii=False) for option in options]
            self._listed += sum(map(len, texts))
            if self._listed > _MAX_CHARS:
                _refuse("the schema", f"lists values of more than {_MAX_CHARS:,} characters")
            value.patterns += map(self._literal, texts)
            return
        kinds = schema.get("type")
        if isinstance(kinds, list) and kinds:
            for kind in kinds:
                others = (_OF_STRINGS | _OF_NUMBERS) - _OF_KIND.get(str(kind), frozenset())
                own = {key: given for key, given in schema.items() if key not in others}
                self._add_value({**own, "type": kind}, where, value, (*refs, where))
            return
        add = {"string": self._string, "integer": self._integer, "number": self._number}.get(str(kinds))
        if add is not None:
            add(schema, where, value)
        elif kinds in ("boolean", "null"):
            _check_keys(schema, {"type"}, where)
            value.patterns += map(self._literal, ("true", "false") if kinds == "boolean" else ("null",))
        elif kinds in ("object", "array"):
            _refuse(where, f"chooses between an {kinds} and something else: a canvas has one frame")
        else:
            _check_keys(schema, {"type"}, where)
            _refuse(where, f"has the type {shorten(json.dumps(kinds))}: say which value it is")

    def _literal(self, text: str) -> Pattern:
        return [self._words.single(token) for token in self._words.encode(text)]

    def _string(self, schema: Mapping[str, Any], where: str, value: _Value) -> None:
        _check_keys(schema, {"type", "minLength", "maxLength"}, where)
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if not _is_whole(low) or not (high is None or _is_whole(high)) or (high is not None and low > high):
            _refuse(where, "has a minLength or maxLength that no string has")
        value.strings.append((low, high))

    def _integer(self, schema: Mapping[str, Any], where: str, value: _Value) -> None:
        keys = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
        _check_keys(schema, {"type", *keys}, where)
        if not all(_is_whole(schema.get(key, 0), signed=True) for key in keys):
            _refuse(where, "is an integer whose bounds are none")
        lows = [schema[k] + add for k, add in (("minimum", 0), ("exclusiveMinimum", 1)) if k in schema]
        highs = [schema[k] - add for k, add in (("maximum", 0), ("exclusiveMaximum", 1)) if k in schema]
        low, high = max(lows, default=None), min(highs, default=None)
        if low is not None and high is not None and high - low < _MAX_LISTED:
            if low > high:
                _refuse(where, "has bounds between which there is no number")
            value.patterns += [self._literal(str(number)) for number in range(low, high + 1)]
            return
        if high is not None or (low or 0) > 1:
            _refuse(
                where,
                f"is an integer: bounds must be less than {_MAX_LISTED} apart, or a minimum of 0 or 1 alone",
            )
        first, further = (
            self._words.digits(begins=True, may_fill=False),
            self._words.digits(begins=False, may_fill=True),
        )
        if low is None or low < 0:
            if low is not None:
                _refuse(where, "is an integer: a negative minimum needs a maximum near it")
            value.patterns.append([self._words.one("-"), first, *[further] * (_DIGITS - 1)])
        if low != 1:
            value.patterns.append([self._words.one("0")])
        value.patterns.append([first, *[further] * (_DIGITS - 1)])

    def _number(self, schema: Mapping[str, Any], where: str, value: _Value) -> None:
        _check_keys(schema, {"type", "minimum"}, where)
        if schema.get("minimum", 0) != 0:
            _refuse(where, "is a number: of bounds a canvas can keep a minimum of 0")
        first, further = (
            self._words.digits(begins=True, may_fill=False),
            self._words.digits(begins=False, may_fill=True),
        )
        digit = self._words.digits(begins=False, may_fill=False)
        behind = [self._words.one("."), digit, *[further] * (_FRACTION - 1)]
        for sign in ([], [self._words.one("-")])[: 1 if "minimum" in schema else 2]:
            for whole in ([self._words.one("0")], [first, *[further] * (_DIGITS - 1)]):
                value.patterns += [[*sign, *whole, *behind], [*sign, *whole]]


def _check_keys(schema: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in schema:
        if key not in known | _SAYS_NOTHING:
            _refuse(where, f"has {shorten(str(key))!r}, which a canvas cannot promise")


def _is_whole(value: Any, *, signed: bool = False) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (signed or value >= 0)


def _is_one_of(value: Any, kinds: Any) -> bool:
    """Whether a value is of a type of JSON Schema, or of one of them."""
    of = {"string": str, "boolean": bool, "null": type(None), "object": dict, "array": list}
    if isinstance(kinds, list):
        return any(_is_one_of(value, kind) for kind in kinds)
    if kinds in ("integer", "number"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (kinds == "number" or value == int(value))
    return isinstance(kinds, str) and kinds in of and isinstance(value, of[kinds])


def _are_apart(options: list[Mapping[str, Any]]) -> bool:
    """Whether nothing can be of two of them, as their types tell."""
    kinds = [str(option.get("type")).replace("integer", "number") for option in options]
    return all(isinstance(option.get("type"), str) for option in options) and len({*kinds}) == len(kinds)


def _are_same(one: Any, other: Any) -> bool:
    """As JSON has it, where 1 is 1.0 but not true."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _refuse(where: str, why: str) -> NoReturn:
    raise RequestError(
        400, f"response_format: {shorten(where)} {why}", param="response_format", code="unsupported_schema"
    )
