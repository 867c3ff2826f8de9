"""POST /v1/responses: OpenAI's newer route, as far as it makes sense of a model that keeps nothing and calls nothing.

Input, instructions and the sampling fields are honoured; conversations that the server would have to keep, tools and reasoning are
refused by name. Streams are OpenAI's named events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from llada.sampling.events import Draft, Finished, Started, Text
from pipelines.serving.dialects.body import Prompt, SamplingBody, refuse_json_object
from pipelines.serving.dialects.parsing import StrictModel
from pipelines.serving.dialects.writer import ReplyWriter, draft_object
from pipelines.serving.errors import RequestError, shorten
from pipelines.serving.events import Written

if TYPE_CHECKING:
    from pipelines.serving.prompts import PromptEncoder

# Fields of OpenAI's that are not supported: the values that ask for nothing, and why not.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "access_programs": ((), "the model calls no tools"),
    "background_options": ((), "a response is waited for"),
    "image": ((), "the model writes text only"),
    "top_logprobs": ((0,), "ask /v1/chat/completions for log-probabilities"),
    "previous_response_id": ((), "nothing is kept: send the conversation as input"),
    "conversation": ((), "nothing is kept: send the conversation as input"),
    "context_management": ((), "nothing is kept: send the conversation as input"),
    "background": ((False,), "a response is waited for"),
    "include": (([],), "there is nothing more to include"),
    "max_tool_calls": ((), "the model calls no tools"),
    "prompt": ((), "nothing is kept: send input and instructions"),
    "reasoning": (({}, {"effort": "none"}, {"effort": None}), "the model has no reasoning mode"),
    "truncation": (("disabled",), "input that is too long is refused"),
}
_PARTS = ("input_text", "output_text", "text")
_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "type": {"enum": ["message"]},
                    "role": {"enum": ["user", "assistant", "system", "developer"]},
                    "content": {
                        "anyOf": [
                            {"type": "string"},
                            {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "properties": {"type": {"enum": [*_PARTS]}, "text": {"type": "string"}},
                                    "required": ["type", "text"],
                                },
                            },
                        ]
                    },
                },
                "required": ["role", "content"],
            },
        },
    ]
}


class Turn(StrictModel):
    """A message of the input; of one that an earlier response gave, id and status are labels."""

    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    role: Literal["user", "assistant", "system"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _accept_client_forms(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("role") == "developer":
            data = {**data, "role": "system"}
        if isinstance(data.get("content"), list):
            data = {**data, "content": "".join(_text_of(part) for part in data["content"])}
        return data


def _text_of(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") in _PARTS and isinstance(part.get("text"), str):
        # prompt_cache_breakpoint is a label: see `Labels`.
        known = {"type", "text", "annotations", "logprobs", "prompt_cache_breakpoint"}
        if unknown := {name for name, value in part.items() if value is not None} - known:
            raise ValueError(f"unknown field {shorten(min(unknown))!r} in a content part")
        return str(part["text"])
    raise ValueError("content parts must be {'type': 'input_text', 'text': …}; the model reads text only")


class TextFormat(StrictModel):
    """As response_format of a chat, with name and schema beside the type."""

    type: Literal["text", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """Objects, nested or not, of strings, numbers, booleans, null, enums and arrays with a fixed number of items."""
    strict: bool | None = None
    """The reply fits the schema in any case."""

    @model_validator(mode="before")
    @classmethod
    def _say_what_for(cls, data: Any) -> Any:
        refuse_json_object(data)
        if isinstance(data, dict):
            is_json = data.get("type") == "json_schema"
            if is_json and data.get("schema") is None:
                raise ValueError("type json_schema goes with a schema")
            for name in ("name", "description", "schema", "strict"):
                if not is_json and data.get(name) is not None:
                    raise ValueError(f"{name} goes with type json_schema")
        return data


class TextForm(StrictModel):
    """The form of the reply."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesBody(SamplingBody):
    """One response to the input."""

    prompt_field: ClassVar[str] = "input"
    format_field: ClassVar[str] = "text.format"

    input: Annotated[list[Turn], WithJsonSchema(_INPUT_SCHEMA)] = Field(min_length=1)
    """A text, or the turns of a conversation."""
    instructions: str | None = None
    """What the system says before all turns."""
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextForm | None = None

    @property
    def limit_field(self) -> str:
        return "max_output_tokens"

    @property
    def json_schema(self) -> dict[str, Any] | None:
        return None if self.form is None else self.form.schema_

    @property
    def form(self) -> TextFormat | None:
        """That the client wants of the reply."""
        return None if self.text is None else self.text.format

    @property
    def num_messages(self) -> int:
        return len(self.input)

    def prompts(self, encoder: PromptEncoder) -> list[Prompt]:
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        turns = [{"role": turn.role, "content": turn.content} for turn in self.input]
        return [Prompt(encoder.encode_chat([*system, *turns]))]

    @classmethod
    def refused(cls) -> dict[str, tuple[tuple[Any, ...], str]]:
        return {**super().refused(), **_REFUSED}

    @field_validator("input", mode="before")
    @classmethod
    def _list_turns(cls, given: Any) -> Any:
        return [{"role": "user", "content": given}] if isinstance(given, str) else given

    @model_validator(mode="after")
    def _refuse_of_other_dialects(self) -> Self:
        if self.n != 1:
            raise RequestError(400, "n: a response is one; ask /v1/chat/completions for several", param="n")
        for name, here in (("max_tokens", self.limit_field), ("response_format", self.format_field)):
            if getattr(self, name) is not None:
                raise RequestError(400, f"{name} is called {here} here", param=name)
        return self


class ResponsesWriter(ReplyWriter):
    """Named events, numbered, and no [DONE]."""

    id_prefix = "resp"
    whole_object = chunk_object = "response"
    end_of_stream = ""
    body: ResponsesBody

    def __init__(self, body: SamplingBody, model_id: str) -> None:
        super().__init__(body, model_id)
        self._sent = 0

    def message(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": text, "logprobs": []}

    def no_delta(self) -> dict[str, Any]:
        return {}

    def whole(self) -> dict[str, Any]:
        end = self._ends.get(0)
        head = self._head("response")
        totals = self._totals()
        usage = totals.pop("usage")
        status = "in_progress" if end is None else "completed" if end.reason == "stop" else "incomplete"
        return {
            "id": head["id"],
            "object": "response",
            "created_at": head["created"],
            "model": head["model"],
            "system_fingerprint": head["system_fingerprint"],
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "error": None,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "metadata": {},
            "output": [] if end is None else [self._item(status)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.body.knobs().get("temperature"),
            "text": {"format": self._format()},
            "tool_choice": "none",
            "tools": [],
            "top_p": self.body.knobs().get("top_p"),
            "truncation": "disabled",
            "usage": None
            if end is None
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            **({} if end is None else totals),
            **({} if end is None else self._trace(0)),
        }

    def chunks(self, event: Written) -> list[dict[str, Any]]:
        first = not self._sent
        chunks = self._opening() if first and not isinstance(event, Started) else []
        self.add(event)
        if isinstance(event, Text) and event.text:
            chunks.append(self._of_part("response.output_text.delta", **self.delta(event.text)))
        elif isinstance(event, Draft):
            chunks.append(self._numbered("draft", draft=draft_object(event)))
        elif isinstance(event, Finished):
            chunks += self._closing(event)
        return chunks

    def closing_chunks(self) -> list[dict[str, Any]]:
        return []

    def frame(self, chunk: dict[str, Any]) -> str:
        data = super().frame(chunk).removeprefix("event: draft\n")
        return f"event: {chunk.get('type', 'error')}\n{data}"

    def _opening(self) -> list[dict[str, Any]]:
        item = {**self._item("in_progress"), "content": []}
        return [
            self._numbered("response.created", response=self.whole()),
            self._numbered("response.in_progress", response=self.whole()),
            self._numbered("response.output_item.added", output_index=0, item=item),
            self._of_part("response.content_part.added", part=self.message("")),
        ]

    def _closing(self, end: Finished) -> list[dict[str, Any]]:
        whole = self.whole()
        (item,) = whole["output"]
        (part,) = item["content"]
        return [
            self._of_part("response.output_text.done", text=part["text"], logprobs=[]),
            self._of_part("response.content_part.done", part=part),
            self._numbered("response.output_item.done", output_index=0, item=item),
            self._numbered(f"response.{whole['status']}", response=whole),
        ]

    def _numbered(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._sent += 1
        return {"type": kind, "sequence_number": self._sent - 1, **fields}

    def _of_part(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._numbered(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    @property
    def _item_id(self) -> str:
        return f"msg_{self._number}"

    def _item(self, status: str) -> dict[str, Any]:
        text = "".join(self._texts.get(0, []))
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self.message(text)],
        }

    def _format(self) -> dict[str, Any]:
        wanted = self.body.form
        if wanted is None or wanted.schema_ is None:
            return {"type": "text"}
        return {
            "type": "json_schema",
            "name": wanted.name or "",
            "schema": wanted.schema_,
            "strict": True,
        }
