"""The endpoint's OpenAPI schema: of requests what the body classes say that parse them, of answers what their writers write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from pydantic.json_schema import models_json_schema

from llada import __version__
from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.dialects.parsing import StrictModel

_REF = "#/components/schemas/{model}"


class Route(Protocol):
    """What is asked for by POST."""

    @property
    def path(self) -> str: ...

    @property
    def body(self) -> type[StrictModel]: ...


def openapi_schema(routes: Iterable[Route]) -> dict[str, Any]:
    """OpenAPI 3.1 of these routes and of what can be read."""
    routes = list(routes)
    _, definitions = models_json_schema(
        [(route.body, "validation") for route in routes], ref_template=_REF, by_alias=True
    )
    components = {**definitions["$defs"], **_ANSWERS}
    paths = {route.path: {"post": _post(route)} for route in routes}
    for path, summary, content in _READS:
        paths[path] = {"get": _operation(summary, content)}
    paths["/v1/models/{name}"]["get"]["parameters"] = [
        {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    paths["/health"]["get"]["responses"]["503"] = {
        "description": "no request can be served",
        "content": _json("Health"),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "llada",
            "version": __version__,
            "description": "A masked-diffusion language model behind OpenAI's routes.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(route: Route) -> dict[str, Any]:
    content = _json(_ANSWER_OF.get(route.path, "Object"))
    if issubclass(route.body, SamplingBody):
        content["text/event-stream"] = {}  # chunks as OpenAI streams them
    summary = (route.body.__doc__ or "").strip().split("\n\n")[0]
    return _operation(" ".join(summary.split()), content) | {
        "requestBody": {"required": True, "content": _json(route.body.__name__)}
    }


def _operation(summary: str, content: dict[str, Any]) -> dict[str, Any]:
    refused = {"description": "OpenAI's error object", "content": _json("Error")}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "the answer", "content": content},
            "4XX": refused,
            "5XX": refused,
        },
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=name)}}}


def _text(kind: str) -> dict[str, Any]:
    return {kind: {"schema": {"type": "string"}}}


_READS = (
    ("/v1/models", "The models that are served", _json("ModelList")),
    ("/v1/models/{name}", "A model: context, mask and defaults", _json("Model")),
    ("/health", "Whether requests can be served", _json("Health")),
    ("/metrics", "Counters in Prometheus' text format", _text("text/plain")),
    ("/", "A page to talk to the model", _text("text/html")),
    ("/docs", "A page of this schema", _text("text/html")),
    ("/openapi.json", "This schema", _json("Object")),
)
_ANSWER_OF = {
    "/v1/completions": "Completion",
    "/v1/chat/completions": "ChatCompletion",
    "/v1/responses": "Response",
    "/tokenize": "Tokens",
    "/detokenize": "Detokenized",
}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these fields, the ones required, and maybe others."""
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(kind: str) -> dict[str, Any]:
    return {"type": [kind, "null"]}


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


def _reply(kind: str, text: dict[str, Any]) -> dict[str, Any]:
    """A whole reply, whose choices hold their text so."""
    reason = {"enum": ["stop", "length"]}
    choice = {"index": _COUNT, **text, "logprobs": _or_null("object"), "finish_reason": reason}
    return _object(
        {
            "id": _STRING,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _STRING,
            "system_fingerprint": _or_null("string"),
            "choices": _list(_object(choice, {"trace": _TRACE, "gaps": _list(_STRING)})),
            "usage": _USAGE,
            "denoising": _DENOISING,
        }
    )


_ANSWERS = {
    "Completion": _reply("text_completion", {"text": _STRING}),
    "ChatCompletion": _reply(
        "chat.completion", {"message": _object({"role": {"const": "assistant"}, "content": _STRING})}
    ),
    "Response": _object(
        {
            "id": _STRING,
            "object": {"const": "response"},
            "created_at": _COUNT,
            "model": _STRING,
            "system_fingerprint": _or_null("string"),
            "status": {"enum": ["completed", "incomplete"]},
            "incomplete_details": _or_null("object"),
            "output": _list(
                _object(
                    {
                        "id": _STRING,
                        "type": {"const": "message"},
                        "role": {"const": "assistant"},
                        "status": _STRING,
                        "content": _list(_object({"type": {"const": "output_text"}, "text": _STRING})),
                    }
                )
            ),
            "usage": _object({"input_tokens": _COUNT, "output_tokens": _COUNT, "total_tokens": _COUNT}),
            "denoising": _DENOISING,
        },
        {"trace": _TRACE},
    ),
    "Tokens": _object({"tokens": _list(_COUNT), "count": _COUNT, "max_model_len": _COUNT}),
    "Detokenized": _object({"prompt": _STRING}),
    "Model": _object(
        {"id": _STRING, "object": {"const": "model"}, "created": _COUNT, "owned_by": _STRING},
        {
            "context_length": _COUNT,
            "vocab_size": _COUNT,
            "num_parameters": _COUNT,
            "mask_token_id": _or_null("integer"),
            "eos_token_id": {},
            "defaults": {"type": "object"},
        },
    ),
    "ModelList": _object({"object": {"const": "list"}, "data": _list({"$ref": _REF.format(model="Model")})}),
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
