"""What the endpoint accepts: OpenAI's request bodies, our sampling fields beside them, and its error objects.

Nothing is ignored in silence: a field that cannot be honoured is refused by name, a misspelt one with the nearest name.
Needs neither torch nor Ray, so that the HTTP front process stays small.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

_ONE_CHOICE = "the sampler unmasks tokens out of order"
# Fields of OpenAI's (and vLLM's) bodies that are not supported: the values that ask for nothing, and why not.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((False,), "a token's probability at its unmasking is not that of the sequence"),
    "top_logprobs": ((0,), "a token's probability at its unmasking is not that of the sequence"),
    "prompt_logprobs": ((), "a token's probability at its unmasking is not that of the sequence"),
    "top_p": ((1,), "use temperature"),
    "top_k": ((-1, 0), "use temperature"),
    "min_p": ((0,), "use temperature"),
    "presence_penalty": ((0,), _ONE_CHOICE),
    "frequency_penalty": ((0,), _ONE_CHOICE),
    "repetition_penalty": ((1,), _ONE_CHOICE),
    "logit_bias": (({},), _ONE_CHOICE),
    "best_of": ((1,), "ask for n choices"),
    "use_beam_search": ((False,), _ONE_CHOICE),
    "response_format": (({"type": "text"},), "no grammar constrains the text"),
    "tools": (([],), "the model calls no tools"),
    "tool_choice": (("none", "auto"), "the model calls no tools"),
    "parallel_tool_calls": ((True, False), "the model calls no tools"),
    "functions": (([],), "the model calls no tools"),
    "function_call": (("none", "auto"), "the model calls no tools"),
    "modalities": ((["text"],), "the model writes text only"),
    "audio": ((), "the model writes text only"),
    "prediction": ((), "there is no speculative decoding"),
    "reasoning_effort": ((), "the model has no reasoning mode"),
    "store": ((False,), "nothing is stored"),
    "metadata": (({},), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
}
_MAX_STOPS = 16
_MAX_STEPS = 4096


class RequestError(Exception):
    """An answer with an HTTP status instead of a reply; `retry_after_s` becomes a Retry-After header."""

    _TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}  # noqa: RUF012

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kind = self._TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """null asks for nothing, also in a field that would be refused."""
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys() | _REFUSED.keys()
        return {name: value for name, value in data.items() if value is not None or name not in known}


class StreamOptions(_Body):
    include_usage: bool = False
    include_canvas: bool = False  # ours: every chunk carries the whole draft, masks included


class SamplingBody(_Body):
    """The fields that completions and chat completions share. None: the server's default."""

    model: str | None = None  # None: the one that is served
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field([], max_length=_MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None  # of no consequence here, as at OpenAI
    # Ours (the OpenAI client sends them through extra_body)
    steps: int | None = Field(None, ge=1, le=_MAX_STEPS)
    block_length: int | None = Field(None, ge=1)
    cfg_scale: float | None = Field(None, ge=0)
    remasking: Literal["low_confidence", "random", "ancestral"] | None = None
    threshold: float | None = Field(None, ge=0, le=1)
    factor: float | None = Field(None, ge=0)
    entropy_bound: float | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, (neutral, reason) in _REFUSED.items():
            if data.get(name) is None or any(_equals(data[name], value) for value in neutral):
                continue
            raise RequestError(
                400,
                f"{name}={json.dumps(data[name])[:100]} is not supported: {reason}",
                param=name,
                code="unsupported_parameter",
            )
        if data.get("stream_options") is not None and data.get("stream") is not True:
            raise RequestError(400, "stream_options goes with stream=true", param="stream_options")
        return {name: value for name, value in data.items() if name not in _REFUSED}

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stops(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and "" in stops:
            raise ValueError("a stop string must not be empty")
        return stops


class CompletionBody(SamplingBody):
    """POST /v1/completions. With `suffix`, the reply is what stands between the prompt and it."""

    prompt: list[str | list[int]]  # in the request also a string, or the token ids of one prompt
    suffix: str = ""
    echo: bool = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _list_prompts(cls, prompt: Any) -> Any:
        if isinstance(prompt, str):
            return [prompt]
        wrong = "must be a string, a list of strings, or a list of token ids or of such lists"
        if not isinstance(prompt, list):
            raise ValueError(wrong)
        if not prompt:
            raise ValueError("must not be empty; an unconditional sample has the prompt ''")
        if all(_is_id(item) for item in prompt):
            return [prompt]
        if not all(
            isinstance(item, str) or (isinstance(item, list) and all(_is_id(i) for i in item))
            for item in prompt
        ):
            raise ValueError(wrong)
        return prompt


class Message(_Body):
    role: Literal["system", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _accept_client_forms(cls, data: Any) -> Any:
        """Content in parts, the role `developer`, and the empty fields of a reply that is sent back as history."""
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value not in (None, [])}
        if data.get("role") == "developer":
            data["role"] = "system"
        content = data.get("content")
        if isinstance(content, list):
            for part in content:
                if (
                    not isinstance(part, dict)
                    or part.get("type") != "text"
                    or not isinstance(part.get("text"), str)
                ):
                    raise ValueError(
                        "content parts must be {'type': 'text', 'text': …}; the model reads text only"
                    )
            data["content"] = "".join(part["text"] for part in content)
        return data


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _rename_max_tokens(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "max_completion_tokens" not in data:
            return data
        data = dict(data)
        limit, older = data.pop("max_completion_tokens"), data.get("max_tokens")
        if limit is not None and older is not None and limit != older:
            message = "max_tokens and max_completion_tokens differ: send one of them"
            raise RequestError(400, message, param="max_completion_tokens")
        return data | {"max_tokens": older if limit is None else limit}


Body = TypeVar("Body", bound=SamplingBody)


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """The request body, or RequestError 400 that names the field and what is wrong with it."""
    try:
        data = json.loads(raw)
        if b"\\ud" in raw.lower():  # half a surrogate pair is legal JSON, but no text
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON text: {error}") from None
    if not isinstance(data, dict):
        raise RequestError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        known = {"": [*kind.model_fields, *_ALIASES.get(kind, ())]} | _KNOWN_INSIDE
        message, param = explain(error, known)
        raise RequestError(400, message, param=param) from None


_ALIASES: dict[type[SamplingBody], tuple[str, ...]] = {ChatBody: ("max_completion_tokens",)}
_KNOWN_INSIDE = {"messages": list(Message.model_fields), "stream_options": list(StreamOptions.model_fields)}


def explain(error: ValidationError, known: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """The first problem in words, and the field it is about; a misspelt name first, because it explains a missing one.

    `known`: the names at the top (key "") and inside of a field, with which a misspelt one is compared.
    """
    problems = error.errors(include_url=False, include_input=False)
    unknown = [p for p in problems if p["type"] in ("extra_forbidden", "unexpected_keyword_argument")]
    first = [*unknown, *problems][0]
    where = first["loc"]
    name = ".".join(str(part) for part in where) or "body"
    if unknown:
        names = known.get("" if len(where) == 1 else str(where[0]), [])
        near = difflib.get_close_matches(str(where[-1]), names, n=1, cutoff=0.6)
        return f"unknown field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""), name
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}: {message[:1].lower()}{message[1:]}", name


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _equals(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
