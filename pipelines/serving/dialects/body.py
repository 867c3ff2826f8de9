"""What every dialect's request body shares: the sampling fields, and what is refused with its reason.

A field of OpenAI's is one of three: honoured (a field of the body), refused by name with the reason unless its value asks
for nothing (`_REFUSED`), or a label on which no answer depends, at OpenAI neither (`Labels`). The sampler's knobs are fields
because `SamplingConfig` declares them (llada/sampling/config.py).
"""

from __future__ import annotations

import json
import re
import typing
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    create_model,
    field_validator,
    model_validator,
)

from llada.sampling.config import SamplingConfig, request_knobs
from llada.settings import field_docs
from pipelines.serving.dialects.parsing import StrictModel
from pipelines.serving.errors import RequestError

if TYPE_CHECKING:
    from pipelines.serving.prompts import PromptEncoder

_ONE_CHOICE = "the sampler unmasks tokens out of order"
# Fields of OpenAI's (and vLLM's) bodies that are not supported: the values that ask for nothing, and why not.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "prompt_logprobs": ((), "send logprobs with echo to /v1/completions"),
    "presence_penalty": ((0,), _ONE_CHOICE),
    "frequency_penalty": ((0,), _ONE_CHOICE),
    "repetition_penalty": ((1,), _ONE_CHOICE),
    "logit_bias": (({},), _ONE_CHOICE),
    "best_of": ((1,), "ask for n choices"),
    "use_beam_search": ((False,), _ONE_CHOICE),
    "tools": (([],), "the model calls no tools"),
    "tool_choice": (("none", "auto"), "the model calls no tools"),
    "parallel_tool_calls": ((True, False), "the model calls no tools"),
    "functions": (([],), "the model calls no tools"),
    "function_call": (("none", "auto"), "the model calls no tools"),
    "modalities": ((["text"],), "the model writes text only"),
    "audio": ((), "the model writes text only"),
    "prediction": ((), "there is no speculative decoding"),
    "reasoning_effort": (("none",), "the model has no reasoning mode"),
    "verbosity": (("medium",), "use max_tokens"),
    "web_search_options": ((), "the model searches nothing"),
    "moderation": ((), "nothing is moderated"),
    "store": ((False,), "nothing is stored"),
    "metadata": (({},), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
}
MAX_TOP = 20
"""Alternatives of a token that one may ask for."""
_MAX_STOPS = 16
_MAX_STOP_CHARS = 500
_NOT_BESIDE_JSON = frozenset(
    {
        *("stop", "stop_token_ids", "ignore_eos", "suffix", "echo", "fixed", "allowed", "forbidden"),
        *("initial_length", "insert_below", "suffix_window", "logits_eos_inf"),
    }
)
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_CHARS}
_MAX_NAME_CHARS = 64
# A position as a key of an object has one spelling, so that no two keys are the same one.
_POSITION = r"0|[1-9][0-9]{0,8}"
_MAX_NAMED_TOKENS = 16_384  # of `allowed` and `forbidden`, at all positions together
# Our limits of a setting (llada/settings.py) and pydantic's.
_LIMITS = {"low": "ge", "above": "gt", "high": "le", "below": "lt"}


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    """Padding against eavesdroppers who count bytes is not supported."""
    include_drafts: bool = False
    """Ours: after every forward an event named `draft` with the whole reply, masks included. As a chunk it adds no text."""


class JsonSchema(StrictModel):
    """OpenAI's: a schema and its name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    """Objects, nested or not, of strings, numbers, booleans, null, enums and arrays with a fixed number of items."""
    strict: bool | None = None
    """The reply fits the schema in any case."""


class ResponseFormat(StrictModel):
    """What form the reply has."""

    type: Literal["text", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="before")
    @classmethod
    def _say_what_for(cls, data: Any) -> Any:
        refuse_json_object(data)
        if isinstance(data, dict) and (data.get("type") == "json_schema") != (
            data.get("json_schema") is not None
        ):
            raise ValueError("type json_schema goes with a json_schema")
        return data


def refuse_json_object(form: Any) -> None:
    """Raises ValueError for OpenAI's older way to ask for JSON."""
    if isinstance(form, dict) and form.get("type") == "json_object":
        raise ValueError("json_object names no fields: send a json_schema, whose frame is written as it is")


def or_one(item: dict[str, Any], max_items: int) -> WithJsonSchema:
    """Of a list in whose place a client may send one item."""
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item, "maxItems": max_items}]})


@dataclass(frozen=True)
class Prompt:
    """What a reply continues, in token ids."""

    ids: Sequence[int]
    suffix: Sequence[int] = ()
    """For infilling: what follows the reply."""
    between: Sequence[Sequence[int] | int] = ()
    """For several gaps: what stands behind the first one, ids and numbers of masks in turn; part of the reply."""
    echo: str | None = None
    """Text that the reply begins with."""

    @property
    def num_between(self) -> int:
        return sum(part if isinstance(part, int) else len(part) for part in self.between)


class Likelihood(NamedTuple):
    """What is asked of an echoed prompt."""

    begin: int
    """The first token whose likelihood is wanted."""
    samples: int | None
    """Of the Monte-Carlo bound; None is the chain rule."""


class Labels(StrictModel):
    """What clients send for OpenAI's own book-keeping and caches. The answer is the same with and without it."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None


def _knob_fields() -> dict[str, Any]:
    """A body field for each knob that a request may set, with the knob's type, limits and documentation."""
    kinds, docs = typing.get_type_hints(SamplingConfig), field_docs(SamplingConfig)
    described: dict[str, Any] = {}
    for knob in request_knobs():
        limits = {_LIMITS[name]: limit for name, limit in knob.metadata.items() if name in _LIMITS}
        if (high := knob.metadata["request_high"]) is not None:
            limits["le"] = high
        kind = _json_kind(kinds[knob.name])
        if kind is str:
            limits["max_length"] = _MAX_NAME_CHARS
        described[knob.name] = (kind | None, Field(None, description=docs[knob.name], **limits))
    return described


def _json_kind(kind: Any) -> Any:
    """The type of a knob in a body: JSON spells the integers that are keys as text, and has lists alone."""
    for option in typing.get_args(kind):
        if typing.get_origin(option) is dict:
            key, value = typing.get_args(option)
            others = () if key is int else typing.get_args(typing.get_args(key)[1])
            reader = BeforeValidator(partial(_read_position, others=others))
            keys = Annotated[key, reader]  # type: ignore[valid-type]
            spellings = "|".join([_POSITION, *map(re.escape, others)])
            named = Field(json_schema_extra={"propertyNames": {"pattern": f"^({spellings})$"}})
            if typing.get_origin(value) is tuple:
                value = list[typing.get_args(value)[0]]  # type: ignore[misc]
            return Annotated[dict[keys, value], named]  # type: ignore[valid-type]
    return kind


def _read_position(key: Any, others: Sequence[str]) -> Any:
    """The number that a key of an object spells; `others` are keys that are names."""
    if key in others or isinstance(key, int):
        return key
    if not re.fullmatch(_POSITION, key):
        also = "".join(f", or {json.dumps(name)}" for name in others)
        raise ValueError(f"input should be a position as it is counted, 0, 1 and so on{also}")
    return int(key)


if TYPE_CHECKING:
    KnobFields = Labels
else:
    KnobFields = create_model("KnobFields", __base__=Labels, __module__=__name__, **_knob_fields())


class SamplingBody(KnobFields):
    """The fields that all dialects share. None: the server's default.

    The knobs are ours (the OpenAI client sends them through extra_body), the others OpenAI's.
    """

    prompt_field: ClassVar[str] = "prompt"
    """What clients of the dialect call that which is continued."""
    format_field: ClassVar[str] = "response_format"
    """What they call the form of the reply."""

    model: str | None = None
    max_tokens: int | None = Field(
        None, ge=1, description="Tokens that the reply may have: masks on its canvas."
    )
    n: int = Field(1, ge=1)
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="Of what is drawn: the same request with it has the same answer.",
    )
    stop: Annotated[
        list[Annotated[str, Field(max_length=_MAX_STOP_CHARS)]], or_one(_STOP_SCHEMA, _MAX_STOPS)
    ] = Field([], max_length=_MAX_STOPS)
    stop_token_ids: list[int] = Field([], max_length=_MAX_STOPS)
    """vLLM's: ids that end the text like EOS; not part of it."""
    ignore_eos: bool = False
    """vLLM's: EOS and the end of a turn are tokens like others, the canvas is filled."""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat | None = None
    """A json_schema makes the reply JSON that fits it, in at most max_tokens tokens: the frame is given, the values are filled
    in. What a canvas of a fixed length cannot promise is refused with its place in the schema."""
    include_trace: bool = False
    """Ours: each choice has a `trace`: of every token the forward that committed it, the model's confidence in it then, and
    its block."""

    @classmethod
    def refused(cls) -> dict[str, tuple[tuple[Any, ...], str]]:
        return _REFUSED

    @property
    def limit_field(self) -> str:
        """The field that says how long the reply may be."""
        return "max_tokens"

    @property
    def token_limit(self) -> int | None:
        """What stands in it."""
        limit: int | None = getattr(self, self.limit_field)
        return limit

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The schema that the reply has to fit."""
        wanted = self.response_format and self.response_format.json_schema
        return wanted.schema_ if wanted else None

    @property
    def num_top(self) -> int | None:
        """How many alternatives of each token are asked for; None: log-probabilities are not."""
        return None

    @property
    def tells_tokens(self) -> bool:
        """Whether the answer says something of each token."""
        return self.num_top is not None or self.include_trace or self.has_gaps

    @property
    def num_gaps(self) -> int:
        """Of a reply that has text which is given between and behind them; 0: of any other."""
        return 0

    @property
    def has_gaps(self) -> bool:
        return self.num_gaps > 0

    @property
    def likelihood(self) -> Likelihood | None:
        """Of the prompts; None: it is not asked for."""
        return None

    @property
    def num_prompts(self) -> int:
        """How many prompts there are, before any is encoded."""
        return 1

    @property
    def num_messages(self) -> int:
        """Turns of a conversation; 0: there is none."""
        return 0

    @abstractmethod
    def prompts(self, encoder: PromptEncoder) -> list[Prompt]:
        """What is to be continued, `n` times each; called in the replica. Raises RequestError for what cannot be."""

    def knobs(self) -> dict[str, Any]:
        """The knobs of the sampler that the request sets."""
        asked = {knob.name: getattr(self, knob.name) for knob in request_knobs()}
        return {name: value for name, value in asked.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = super().__get_pydantic_json_schema__(core, handler)
        for name, (neutral, reason) in cls.refused().items():
            if name not in schema["properties"]:
                told = {"enum": [*neutral, None], "description": f"Not supported: {reason}."}
                schema["properties"][name] = told
        return schema

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, (neutral, reason) in cls.refused().items():
            given = data.get(name)
            if isinstance(given, dict):  # nor does null in it ask for anything
                given = {key: value for key, value in given.items() if value is not None}
            if given is None or any(_equals(given, value) for value in neutral):
                continue
            raise RequestError(
                400,
                f"{name}={json.dumps(data[name])[:100]} is not supported: {reason}",
                param=name,
                code="unsupported_parameter",
            )
        if data.get("stream_options") is not None and data.get("stream") is not True:
            raise RequestError(400, "stream_options goes with stream=true", param="stream_options")
        return {name: value for name, value in data.items() if name not in cls.refused()}

    @model_validator(mode="after")
    def _refuse_beside_json(self) -> Self:
        if self.json_schema is not None:
            for name in _NOT_BESIDE_JSON & self.model_fields_set:
                if (value := getattr(self, name)) is not None and value not in ([], False, ""):
                    message = f"{name} does not go with a json_schema, which says where the reply ends and what may stand in it"
                    raise RequestError(400, message, param=name)
        return self

    @model_validator(mode="after")
    def _bound_named_tokens(self) -> Self:
        for name in ("allowed", "forbidden"):
            named = sum(map(len, (getattr(self, name) or {}).values()))
            if named > _MAX_NAMED_TOKENS:
                message = f"{name} names {named:,} tokens; this endpoint takes {_MAX_NAMED_TOKENS:,}"
                raise RequestError(400, message, param=name)
        return self

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stops(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and "" in stops:
            raise ValueError("a stop string must not be empty")
        return stops


def _equals(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
