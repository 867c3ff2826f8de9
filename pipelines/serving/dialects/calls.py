"""What is asked of the model's side without a reply: its tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import ConfigDict, Field, model_validator

from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.dialects.chat import Message
from pipelines.serving.dialects.parsing import StrictModel
from pipelines.serving.errors import RequestError
from pipelines.serving.events import Answer, Written

if TYPE_CHECKING:
    from pipelines.serving.prompts import PromptEncoder


class CallBody(StrictModel):
    """One question and one answer. Beside its own fields it has those names of `SamplingBody` that the routes ask for."""

    prompt_field: ClassVar[str] = "prompt"
    stream: ClassVar[bool] = False
    n: ClassVar[int] = 1
    num_prompts: ClassVar[int] = 1
    token_limit: ClassVar[int] = 0
    tells_tokens: ClassVar[bool] = True

    model: str | None = None

    @property
    def num_messages(self) -> int:
        return 0

    @abstractmethod
    def answer(self, encoder: PromptEncoder) -> dict[str, Any]:
        """The JSON of the answer; called in the replica. Raises RequestError."""


class TokenizeBody(CallBody):
    """Text, or a conversation up to the open turn of the assistant, as token ids (vLLM's route)."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)

    @property
    def num_messages(self) -> int:
        return len(self.messages or ())

    @model_validator(mode="after")
    def _want_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError(400, "send either prompt or messages", param="prompt")
        return self

    def answer(self, encoder: PromptEncoder) -> dict[str, Any]:
        if self.messages is None:
            ids = encoder.encode_text(self.prompt or "")
        else:
            ids = encoder.encode_chat(
                [{"role": turn.role, "content": turn.content} for turn in self.messages]
            )
        return {"tokens": ids, "count": len(ids), "max_model_len": encoder.context_length}


class DetokenizeBody(CallBody):
    """Token ids as text, without special tokens (vLLM's route)."""

    prompt_field: ClassVar[str] = "tokens"

    tokens: list[int]

    def answer(self, encoder: PromptEncoder) -> dict[str, Any]:
        return {"prompt": encoder.decode(encoder.check_ids(self.tokens, "tokens"))}


AnyBody = SamplingBody | CallBody


class CallWriter:
    """The answer as it is; see `ReplyWriter`."""

    system_fingerprint: str | None = None
    run_id: str | None = None

    def __init__(self, body: CallBody, model_id: str) -> None:
        self._content: dict[str, Any] = {}

    def add(self, event: Written) -> None:
        if isinstance(event, Answer):
            self._content = event.content

    def restart(self) -> None:
        """Another replica begins anew."""

    def whole(self) -> dict[str, Any]:
        return self._content
