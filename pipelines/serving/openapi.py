"""The endpoint's OpenAPI schema: of requests what the body classes say that parse them, of answers what their writers write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from pydantic.json_schema import models_json_schema

from llada import __version__
from pipelines.serving.dialects.body import SamplingBody
from pipelines.serving.dialects.parsing import StrictModel
from pipelines.serving.openapi_answers import ANSWERS, ref


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
        [(route.body, "validation") for route in routes], ref_template=ref("{model}"), by_alias=True
    )
    components = {**definitions["$defs"], **ANSWERS}
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
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": "server-sent events, as OpenAI streams them"},
            # OpenAPI 3.2 has it as itemSchema: the JSON of an event's data. (A last one of the first two is "[DONE]".)
            "x-item-schema": {"$ref": ref(_EVENT_OF.get(route.path, "Object"))},
        }
    summary = (route.body.__doc__ or "").strip().split("\n\n")[0]
    operation = _operation(" ".join(summary.split()), content)
    operation["responses"]["200"]["headers"] |= {"system-fingerprint": _header("of what has answered")}
    return operation | {"requestBody": {"required": True, "content": _json(route.body.__name__)}}


def _operation(summary: str, content: dict[str, Any]) -> dict[str, Any]:
    told = {
        "x-request-id": _header("the request's, or one of ours"),
        "llada-version": _header("of this code"),
    }
    later = {"Retry-After": _header("seconds; of 429 and 503")}
    refused = {"description": "OpenAI's error object", "headers": told | later, "content": _json("Error")}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "the answer", "headers": told, "content": content},
            "4XX": refused,
            "5XX": refused,
        },
    }


def _header(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": ref(name)}}}


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
# Of an event of a stream.
_EVENT_OF = {
    "/v1/completions": "CompletionEvent",
    "/v1/chat/completions": "ChatCompletionEvent",
    "/v1/responses": "ResponseEvent",
}
