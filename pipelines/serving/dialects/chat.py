"""POST /v1/chat/completions: a conversation, continued by the assistant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.serving.dialects.body import Prompt, SamplingBody, StrictModel
from pipelines.serving.dialects.writer import ReplyWriter
from pipelines.serving.errors import RequestError

if TYPE_CHECKING:
    from pipelines.serving.prompts import PromptEncoder


class Message(StrictModel):
    """One turn of a conversation."""

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
    """A conversation whose next turn is the assistant's."""

    other_names: ClassVar[tuple[str, ...]] = ("max_completion_tokens",)

    messages: list[Message] = Field(min_length=1)

    def prompts(self, encoder: PromptEncoder) -> list[Prompt]:
        turns = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        return [Prompt(encoder.encode_chat(turns))]

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


class ChatWriter(ReplyWriter):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def first_delta(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def last_delta(self) -> dict[str, Any]:
        return {"delta": {}}
