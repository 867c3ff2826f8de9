"""Strict parsing of a request's body: what is no object of these fields and types is refused with the field and the reason.

A misspelt name is refused with the nearest one, a name that stands twice as well.
"""

from __future__ import annotations

import json
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator

from llada.errors import hint
from pipelines.serving.errors import RequestError, shorten

# Of objects and lists in each other: less than what pydantic and pickle can follow on the way to the replica.
_MAX_DEPTH = 256


class StrictModel(BaseModel):
    """An object of a request body: unknown names and loose types are errors, null asks for nothing."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """What pydantic says of the fields, and what the validators that come before them accept as well."""
        schema = handler.resolve_ref_schema(handler(core))
        for name, field in schema.get("properties", {}).items():
            for word in ("title", "default") if field.get("default", ...) is None else ("title",):
                field.pop(word, None)
            if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                described = {key: field.pop(key) for key in ("description", "default") if key in field}
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **described}
        return schema

    @classmethod
    def refused(cls) -> dict[str, tuple[tuple[Any, ...], str]]:
        """{field of OpenAI's that is not supported: the values that ask for nothing, and why not}."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """null asks for nothing, also in a field that would be refused."""
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys() | cls.refused().keys()
        return {name: value for name, value in data.items() if value is not None or name not in known}


Body = TypeVar("Body", bound=StrictModel)


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """The request body, or RequestError 400 that names the field and what is wrong with it."""
    try:
        # Decoded here: json.loads lets bytes of half a surrogate pair pass, and guesses at other encodings.
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
        try:
            text, is_json = json.dumps(data, ensure_ascii=False, allow_nan=False), True
        except ValueError:  # of a number; where it is a field's, that is named below
            text, is_json = json.dumps(data, ensure_ascii=False), False
        text.encode()  # half a surrogate pair is legal JSON, but no text
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON text in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise RequestError(400, "the body must be a JSON object")
    if _is_deeper(data, _MAX_DEPTH):
        raise RequestError(400, f"the body has more than {_MAX_DEPTH} objects and lists in each other")
    try:
        body = kind.model_validate(data)
    except ValidationError as error:
        message, param = _explain(error, kind)
        raise RequestError(400, message, param=param) from None
    if not is_json:
        raise RequestError(
            400, "the body holds a number that is none in JSON: NaN, or one too large for a float"
        )
    return body


def _is_deeper(data: Any, depth: int) -> bool:
    level = [data]
    for _ in range(depth):
        inner = [value for each in level for value in (each.values() if isinstance(each, dict) else each)]
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        twice = shorten(Counter(name for name, _ in pairs).most_common(1)[0][0])
        raise RequestError(400, f"the body says {twice!r} twice: send one of them", param=twice)
    return data


def _names_at(kind: type[BaseModel], where: Sequence[str | int]) -> list[str]:
    """The names that the object at this place of the body may have."""
    for part in where:
        field = kind.model_fields.get(str(part))
        kind = next(_models_in(field.annotation), kind) if field is not None else kind
    return [field.alias or name for name, field in kind.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


def _explain(error: ValidationError, kind: type[StrictModel]) -> tuple[str, str]:
    """The first problem in words, and the field it is about; a misspelt name first, because it explains a missing one."""
    problems = error.errors(include_url=False, include_input=False)
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    first = [*unknown, *problems][0]
    where = first["loc"] if unknown else _place(first["loc"])
    name = shorten(".".join(str(part) for part in where)) or "body"
    if unknown:
        nearest = hint(shorten(str(where[-1])), _names_at(kind, where[:-1]))
        return f"unknown field {name!r}; {nearest}", name
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}: {message[:1].lower()}{message[1:]}", name


def _place(where: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Without what pydantic adds to the client's own names: which option of a type it tried, or that a key is wrong."""
    return (*where[:1], *(part for part in where[1:] if part not in ("int", "str", "[key]")))
