"""The OpenAPI 3.1 document of the HTTP API, generated from the request and answer types.

Types, ranges and limits come from the annotations that the decoder enforces; this module adds only words
and routes. Must never describe by hand what a type already says.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from holdfast.openai import describe
from holdfast.openai.headers import LONGEST_TIMEOUT_MS
from holdfast.openai.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ErrorBody,
    Model,
    ModelList,
)
from holdfast.openai.types import ChatCompletionRequest, CompletionRequest

Json = dict[str, Any]
_TYPES = (
    ChatCompletionRequest,
    CompletionRequest,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Model,
    ModelList,
    ErrorBody,
)


@lru_cache(maxsize=4)
def openapi(version: str, *, api_keys: bool = False) -> bytes:
    """Return the OpenAPI document as JSON.

    Args:
        version: of Holdfast.
        api_keys: whether this server asks for API keys.
    """
    return msgspec.json.encode(document(version, api_keys=api_keys))


def document(version: str, *, api_keys: bool = False) -> Json:
    """Return the OpenAPI document as builtins; arguments as `openapi`."""
    components: Json = {"schemas": _schemas()}
    result: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "Holdfast",
            "version": version,
            "summary": "OpenAI-compatible API that never lets go of a stream.",
            "description": describe.INTRODUCTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [
            {"name": "models", "description": "Generation"},
            {"name": "operation", "description": "For operators"},
        ],
        "paths": _paths(),
        "components": components,
    }
    if api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        result["security"] = [{"key": []}]
    return result


def _schemas() -> Json:
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    for name, schema in schemas.items():
        for field, words in describe.FIELDS.items():
            owner, _, field_name = field.rpartition(".")
            if field_name in schema.get("properties", {}) and owner in ("", name):
                schema["properties"][field_name].setdefault("description", words)
    return schemas


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Json, **more: Any) -> Json:
    return {"application/json": {"schema": schema, **more}}


def _answer(description: str, content: Json, headers: Json | None = None) -> Json:
    return {"description": description, "content": content, "headers": headers or {}}


_REQUEST_ID = {
    "x-request-id": {"description": "The request's label.", "schema": {"type": "string"}},
    "x-trace-id": {"description": "Its trace in logs and traces, 32 hex digits.", "schema": {"type": "string"}},
}
_RETRY = {
    "retry-after": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
    "x-should-retry": {"description": "'false' where repeating can't help.", "schema": {"type": "string"}},
}


def _errors(*statuses: int) -> Json:
    headers = {**_REQUEST_ID, **_RETRY}
    return {str(s): _answer(describe.STATUSES[s], _json(_ref("ErrorBody")), headers) for s in statuses}


def _parameters() -> list[Json]:
    milliseconds = {"type": "integer", "minimum": 1, "maximum": LONGEST_TIMEOUT_MS}
    kinds: Json = {"ms": milliseconds, "int": {"type": "integer"}, "str": {"type": "string"}}
    return [
        {"name": name, "in": "header", "required": False, "description": words, "schema": kinds[kind]}
        for name, kind, words in describe.HEADERS
    ]


def _generate(summary: str, request: str, answer: str, chunk: str, example: Json) -> Json:
    streamed = {"text/event-stream": {"schema": _ref(chunk)}}
    return {
        "tags": ["models"],
        "summary": summary,
        "description": describe.STREAMING,
        "parameters": _parameters(),
        "requestBody": {"required": True, "content": _json(_ref(request), example=example)},
        "responses": {
            "200": _answer("The answer, or its stream.", {**_json(_ref(answer)), **streamed}, _REQUEST_ID),
            **_errors(400, 401, 404, 413, 500, 502, 503, 504),
        },
    }


def _read(summary: str, schema: Json, *errors: int, tag: str = "operation", path: str | None = None) -> Json:
    operation: Json = {
        "tags": [tag],
        "summary": summary,
        "responses": {"200": _answer("As asked.", _json(schema)), **_errors(*errors)},
    }
    if path:
        operation["parameters"] = [{"name": path, "in": "path", "required": True, "schema": {"type": "string"}}]
    return {"get": operation}


def _paths() -> Json:
    status = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
    metrics = _read("Metrics in the Prometheus text format.", {})
    metrics["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "/v1/chat/completions": {
            "post": _generate(
                "Answer a conversation.",
                "ChatCompletionRequest",
                "ChatCompletion",
                "ChatCompletionChunk",
                {"model": "model", "messages": [{"role": "user", "content": "Hello"}], "stream": True},
            )
        },
        "/v1/completions": {
            "post": _generate(
                "Continue a text.",
                "CompletionRequest",
                "Completion",
                "Completion",
                {"model": "model", "prompt": "Once upon a time", "max_tokens": 32},
            )
        },
        "/v1/models": _read("List the models that are served.", _ref("ModelList"), 401, tag="models"),
        "/v1/models/{model}": _read("Describe a model.", _ref("Model"), 401, 404, tag="models", path="model"),
        "/health": _read("Whether requests can be served, and by which instances.", status, 503),
        "/live": _read("Whether the process runs.", status, 503),
        "/metrics": metrics,
    }
