"""What the endpoint answers, as JSON Schema: whole answers, the events of streams, errors."""

from __future__ import annotations

from typing import Any

from llada.sampling.config import request_knobs


def ref(model: str) -> str:
    """To one of the OpenAPI document's schemas."""
    return f"#/components/schemas/{model}"


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these fields, the ones required, and maybe others."""
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(kind: str) -> dict[str, Any]:
    return {"type": [kind, "null"]}


def _maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_STRING, _COUNT, _NUMBER = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "number"}
_TRACE = _object(
    {
        "tokens": _list(_STRING),
        "token_ids": _list(_COUNT),
        "blocks": _list(_COUNT),
        "steps": _list(_or_null("integer")),
        "confidences": _list(_or_null("number")),
    }
)
_USAGE = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_DENOISING = _object({"forwards": _COUNT, "tokens_per_forward": _NUMBER})


# What is told of a token of a chat, and of a completion's.
_LOGPROB = _object({"token": _STRING, "logprob": _NUMBER, "bytes": _list(_COUNT)})
_CHAT_LOGPROBS = _object(
    {
        "content": _list(_object({**_LOGPROB["properties"], "top_logprobs": _list(_LOGPROB)})),
        "refusal": {"type": "null"},
    }
)
_COMPLETION_LOGPROBS = _object(
    {
        "tokens": _list(_STRING),
        "token_logprobs": _list(_or_null("number")),
        "top_logprobs": _maybe(_list(_maybe({"type": "object", "additionalProperties": _NUMBER}))),
        "text_offset": _list(_COUNT),
    }
)
_DRAFT = _object(
    {
        "forwards": _COUNT,
        "block": _list(_COUNT),
        "tokens": _list(_or_null("string")),
        "steps": _list(_or_null("integer")),
        "confidences": _list(_or_null("number")),
    }
)


def _head(kind: str) -> dict[str, Any]:
    return {
        "id": _STRING,
        "object": {"const": kind},
        "created": _COUNT,
        "model": _STRING,
        "system_fingerprint": _or_null("string"),
    }


def _reply(kind: str, text: dict[str, Any], logprobs: dict[str, Any]) -> dict[str, Any]:
    """A whole reply, whose choices hold their text and what is told of its tokens so."""
    reason = {"enum": ["stop", "length"]}
    choice = {"index": _COUNT, **text, "logprobs": _maybe(logprobs), "finish_reason": reason}
    choices = _list(_object(choice, {"trace": _TRACE, "gaps": _list(_STRING)}))
    return _object({**_head(kind), "choices": choices, "usage": _USAGE, "denoising": _DENOISING})


def _event(kind: str, text: dict[str, Any], logprobs: dict[str, Any]) -> dict[str, Any]:
    """A chunk, with a draft in an event named "draft"; at the end the usage, where it is asked for; or an error."""
    reason = {"enum": ["stop", "length", None]}
    choice = {"index": _COUNT, **text, "logprobs": _maybe(logprobs), "finish_reason": reason}
    choices = _list(_object(choice, {"trace": _TRACE, "gaps": _list(_STRING)}))
    others = {"usage": _maybe(_USAGE), "denoising": _DENOISING, "draft": _DRAFT}
    return {"anyOf": [_object({**_head(kind), "choices": choices}, others), {"$ref": ref("Error")}]}


_PART = _object({"type": {"const": "output_text"}, "text": _STRING})
_ITEM = _object(
    {
        "id": _STRING,
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "status": {"enum": ["in_progress", "completed", "incomplete"]},
        "content": _list(_PART),
    }
)
_PLACE = {"item_id": _STRING, "output_index": _COUNT, "content_index": _COUNT}
_RESPONSE_HEAD = {
    "id": _STRING,
    "object": {"const": "response"},
    "created_at": _COUNT,
    "model": _STRING,
    "system_fingerprint": _or_null("string"),
    "status": {"enum": ["in_progress", "completed", "incomplete"]},
    "output": _list(_ITEM),
}
_RESPONSE = _object(
    _RESPONSE_HEAD
    | {
        "status": {"enum": ["completed", "incomplete"]},
        "incomplete_details": _maybe(_object({"reason": {"const": "max_output_tokens"}})),
        "usage": _object({"input_tokens": _COUNT, "output_tokens": _COUNT, "total_tokens": _COUNT}),
        "denoising": _DENOISING,
    },
    {"trace": _TRACE},
)


def _numbered(kinds: list[str], fields: dict[str, Any]) -> dict[str, Any]:
    """An event of a response."""
    return _object({"type": {"enum": kinds}, "sequence_number": _COUNT, **fields})


ANSWERS: dict[str, Any] = {
    "Completion": _reply("text_completion", {"text": _STRING}, _COMPLETION_LOGPROBS),
    "CompletionEvent": _event("text_completion", {"text": _STRING}, _COMPLETION_LOGPROBS),
    "ChatCompletion": _reply(
        "chat.completion",
        {"message": _object({"role": {"const": "assistant"}, "content": _STRING})},
        _CHAT_LOGPROBS,
    ),
    "ChatCompletionEvent": _event(
        "chat.completion.chunk",
        {"delta": _object({}, {"role": {"const": "assistant"}, "content": _STRING})},
        _CHAT_LOGPROBS,
    ),
    "Response": _RESPONSE,
    "ResponseEvent": {
        "anyOf": [
            _numbered(["response.created", "response.in_progress"], {"response": _object(_RESPONSE_HEAD)}),
            _numbered(["response.completed", "response.incomplete"], {"response": {"$ref": ref("Response")}}),
            _numbered(
                ["response.output_item.added", "response.output_item.done"],
                {"output_index": _COUNT, "item": _ITEM},
            ),
            _numbered(
                ["response.content_part.added", "response.content_part.done"], {**_PLACE, "part": _PART}
            ),
            _numbered(["response.output_text.delta"], {**_PLACE, "delta": _STRING}),
            _numbered(["response.output_text.done"], {**_PLACE, "text": _STRING}),
            _numbered(["draft"], {"draft": _DRAFT}),
            {"$ref": ref("Error")},
        ]
    },
    "Tokens": _object({"tokens": _list(_COUNT), "count": _COUNT, "max_model_len": _COUNT}),
    "Detokenized": _object({"prompt": _STRING}),
    "Model": _object(
        {"id": _STRING, "object": {"const": "model"}, "created": _COUNT, "owned_by": _STRING},
        {
            "context_length": _COUNT,
            "vocab_size": _COUNT,
            "num_parameters": _COUNT,
            "mask_token_id": _or_null("integer"),
            "eos_token_id": {"anyOf": [_or_null("integer"), _list(_COUNT)]},
            "defaults": _object(
                {
                    "max_tokens": _COUNT,
                    **{
                        knob.name: {"$ref": f"{ref('CompletionBody')}/properties/{knob.name}"}
                        for knob in request_knobs()
                    },
                }
            ),
        },
    ),
    "ModelList": _object({"object": {"const": "list"}, "data": _list({"$ref": ref("Model")})}),
    "Health": _object(
        {"status": {"enum": ["ok", "starting", "unavailable", "draining"]}}, {"reason": _STRING}
    ),
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _STRING,
                    "type": _STRING,
                    "param": _or_null("string"),
                    "code": _or_null("string"),
                }
            )
        }
    ),
    "Object": {"type": "object"},
}
