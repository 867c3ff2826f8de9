"""POST /v1/chat/completions: a conversation, continued by the assistant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from llada.sampling.events import Token, show_bytes
from pipelines.serving.dialects.body import MAX_TOP, Prompt, SamplingBody
from pipelines.serving.dialects.parsing import StrictModel
from pipelines.serving.dialects.writer import ReplyWriter
from pipelines.serving.errors import RequestError, shorten

if TYPE_CHECKING:
    from pipelines.serving.prompts import PromptEncoder


_ROLES = Literal["system", "user", "assistant", "tool", "function"]
# What a turn of the assistant may carry beside text, and this model's turns do not.
_NOT_TEXT = {
    "tool_calls": "the model calls no tools",
    "function_call": "the model calls no tools",
    "audio": "the model reads text only",
}


_PART_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "refusal"]},
        "text": {"type": "string"},
        "refusal": {"type": "string"},
    },
    "required": ["type"],
}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}


class Message(StrictModel):
    """One turn of a conversation.

    The chat template sees the role and the text. `name`, `tool_call_id` and `type` are accepted from clients that send
    them: they tie a turn to a person or a call, for which LLaDA's template has no place.
    """

    type: Literal["text", "message"] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    role: Annotated[_ROLES, WithJsonSchema({"enum": [*get_args(_ROLES), "developer"]})]
    content: Annotated[str, WithJsonSchema(_CONTENT_SCHEMA)]

    @field_validator("role")
    @classmethod
    def _ask_for_the_call(cls, role: str, info: ValidationInfo) -> str:
        if role == "tool" and info.data.get("tool_call_id") is None:
            raise ValueError("a turn of 'tool' needs the tool_call_id that it answers")
        return role

    @model_validator(mode="before")
    @classmethod
    def _accept_client_forms(cls, data: Any) -> Any:
        """Content in parts, the role `developer`, and the fields of a reply that is sent back as history."""
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value not in (None, [])}
        if data.get("role") == "developer":
            data["role"] = "system"
        if isinstance(data.get("content"), list):
            data["content"] = "".join(_text_of(part) for part in data["content"])
        if data.get("role") == "assistant":
            for name in _NOT_TEXT.keys() & data.keys():
                raise ValueError(f"{name} is not supported: {_NOT_TEXT[name]}")
            # A reply of OpenAI's has a content, a refusal or (an empty turn) neither.
            refusal = data.pop("refusal", None)
            if refusal is not None and data.setdefault("content", refusal) != refusal:
                raise ValueError("content and refusal differ: send one of them")
            data.setdefault("content", "")
        return data


def _text_of(part: Any) -> str:
    """The text of a part of a message's content."""
    if isinstance(part, dict):
        kind = part.get("type")
        # prompt_cache_breakpoint is a label: see `Labels`.
        asked = {name for name, value in part.items() if value is not None}
        unknown = asked - {"type", str(kind), "prompt_cache_breakpoint"}
        if kind in ("text", "refusal") and isinstance(part.get(kind), str):
            if unknown:
                raise ValueError(f"unknown field {shorten(min(unknown))!r} in a content part")
            return str(part[kind])
    raise ValueError("content parts must be {'type': 'text', 'text': …}; the model reads text only")


class ChatBody(SamplingBody):
    """A conversation whose next turn is the assistant's."""

    prompt_field: ClassVar[str] = "messages"

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of max_tokens."""
    logprobs: bool = False
    """For each token its log-probability in the forward that unmasked it, at temperature 1 among what may stand there."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    """And so many of the likeliest tokens there."""

    @property
    def num_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit_field(self) -> str:
        return super().limit_field if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_messages(self) -> int:
        return len(self.messages)

    def prompts(self, encoder: PromptEncoder) -> list[Prompt]:
        turns = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        return [Prompt(encoder.encode_chat(turns))]

    @model_validator(mode="after")
    def _refuse_top_alone(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise RequestError(400, "top_logprobs goes with logprobs=true", param="top_logprobs")
        return self

    @model_validator(mode="after")
    def _refuse_two_limits(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.token_limit:
            message = "max_tokens and max_completion_tokens differ: send one of them"
            raise RequestError(400, message, param="max_completion_tokens")
        return self


class ChatWriter(ReplyWriter):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            _logprob(token.raw, token.logprob)
            | {"top_logprobs": [_logprob(spelled, value) for spelled, value in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def first_delta(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def no_delta(self) -> dict[str, Any]:
        return {"delta": {}}


def _logprob(spelled: bytes, value: float | None) -> dict[str, Any]:
    """What OpenAI says of a token. One that was given had no probability: 0, as it was certain."""
    return {"token": show_bytes(spelled), "logprob": value or 0.0, "bytes": list(spelled)}
