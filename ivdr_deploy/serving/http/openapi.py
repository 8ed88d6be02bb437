"""The description of the inference port for machines: an OpenAPI document, made from what the code itself reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ivdr_deploy import __version__
from ivdr_deploy.errors import IvdrError
from ivdr_deploy.events import Event
from ivdr_deploy.records import json_schema
from ivdr_deploy.runtimes.base import LoadedModel
from ivdr_deploy.serving.core.answers import status_of
from ivdr_deploy.serving.core.parsing import JsonBody
from ivdr_deploy.serving.core.schema import METHODS, Options
from ivdr_deploy.serving.http.oip_wire import HEADER_LENGTH, JsonRequest
from ivdr_deploy.spec import ViewPlan
from ivdr_deploy.video.reader import VideoInfo

_REASONS = {
    400: "The request or the video in it cannot be read",
    401: "The request does not show the token, where one is asked for",
    404: "There is nothing at this path",
    405: "The method carries no request",
    408: "The request did not come whole in time",
    413: "The video is larger than the limits allow",
    415: "A media file without pictures, or a body that is compressed",
    422: "An option is not to be had, or the pictures are damaged",
    424: "The server that a URL names did not give the video",
    429: "As many requests as are taken at a time are being answered",
    500: "The network failed on this video, or there is a defect of ours",
    503: "The endpoint is about to stop, or the process that had the request has ended",
    504: "Decoding took longer than the limit",
}
"""Of an answer that is an error, by status."""


def document(model: LoadedModel) -> dict[str, Any]:
    """Describe every path of the inference port of a server with this model."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"ivdr_deploy: {model.name}",
            "version": __version__,
            "description": "Sends videos through one model, and answers with what it says about each.",
        },
        "security": [{}, {"token": []}],  # asked for or not, as the server was started
        "paths": {
            f"/predictions/{model.name}": _predict(""),
            f"/predictions/{model.name}/{model.version}": _predict("Version"),
            "/ping": {"get": _get("Whether the process lives", _ref("Alive"))},
            "/ready": {
                "get": _get("Whether the network answers right", _ref("Ready"), unready=_ref("Error"))
            },
            "/v2": {"get": _get("What this server is", _ref("ServerMetadata"))},
            "/v2/health/live": {"get": _get("Whether the process lives", _ref("TensorLive"))},
            "/v2/health/ready": {"get": _tensor_ready()},
            **_tensor_paths(f"/v2/models/{model.name}", ""),
            **_tensor_paths(f"/v2/models/{model.name}/versions/{model.version}", "Version"),
        },
        "components": {
            "schemas": _schemas(model),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


def _json(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _get(summary: str, schema: dict[str, Any], *, unready: dict[str, Any] | None = None) -> dict[str, Any]:
    responses = {"200": _json(schema, "Yes, or what was asked for")}
    if unready is not None:
        responses["503"] = _json(unready, "No")
    return {"summary": summary, "responses": responses}


def _tensor_ready() -> dict[str, Any]:
    return _get("Whether the network answers right", _ref("TensorReady"), unready=_ref("TensorReady"))


def _failures(schema: dict[str, Any]) -> dict[str, Any]:
    codes: dict[int, set[str]] = {}
    for kind in _kinds(IvdrError):
        codes.setdefault(status_of(kind("")), set()).add(kind.code)
    found = {}
    for status, reason in _REASONS.items():
        # With 500 stands every code that the table of statuses does not name: no list to rely on.
        known = ", ".join(sorted(codes.get(status, ()))) if status != 500 else ""
        found[str(status)] = _json(schema, f"{reason} ({known})" if known else reason)
        if status in (429, 503):
            found[str(status)]["headers"] = {
                "Retry-After": {
                    "schema": {"type": "integer"},
                    "description": "Seconds until it may be sent again",
                }
            }
    return found


def _kinds(kind: type[IvdrError]) -> Iterator[type[IvdrError]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from _kinds(inner)


def _options() -> dict[str, Any]:
    found = json_schema(Options)
    timeline = found["properties"]["timeline"]
    timeline["anyOf"].append({"type": "boolean"})  # the defaults, or none
    return found


def _predict(suffix: str) -> dict[str, Any]:
    options = _options()["properties"]
    form = {"type": "string", "contentMediaType": "application/octet-stream"}
    content = {
        "application/octet-stream": {"schema": {}},
        "application/json": {"schema": _ref("JsonBody")},
        "multipart/form-data": {
            # Options as one field of JSON, or each in a field of its own.
            "schema": _object({"video": form}, options={"type": "string"}, **options)
        },
    }
    return {
        method.lower(): {
            "operationId": f"{method.lower()}Video{suffix}",
            "summary": "Say what is to be seen in a video",
            "parameters": [
                {"name": "X-Request-Id", "in": "header", "schema": {"type": "string", "maxLength": 128}},
                *(
                    {"name": name, "in": "query", "schema": schema, "style": "form", "explode": False}
                    for name, schema in options.items()
                ),
            ],
            "requestBody": {"required": True, "content": content},
            "responses": {
                "200": {
                    "description": "What the network says",
                    "content": {
                        "application/json": {"schema": {"anyOf": [_ref("Answer"), _ref("Timeline")]}},
                        # Of a timeline: `window`, `event`, and `summary` or `error`, each with JSON as its data.
                        "text/event-stream": {},
                    },
                    "headers": {"X-Request-Id": {"schema": {"type": "string"}}},
                },
                **_failures(_ref("Error")),
            },
        }
        for method in METHODS
    }


def _tensor_paths(base: str, suffix: str) -> dict[str, Any]:
    """Describe the paths of the Open Inference Protocol."""
    content: dict[str, Any] = {
        "application/json": {"schema": _ref("TensorRequest")},
        # JSON, and the bytes of tensors behind it.
        "application/octet-stream": {"schema": {}},
    }
    answers: dict[str, Any] = {
        "200": {
            "description": "What the network says",
            "content": {"application/json": {"schema": _ref("TensorAnswer")}, "application/octet-stream": {}},
            "headers": {HEADER_LENGTH: {"schema": {"type": "integer"}}},
        },
        **_failures(_ref("TensorError")),
    }
    length = {"name": HEADER_LENGTH, "in": "header", "schema": {"type": "integer", "minimum": 0}}
    return {
        base: {"get": _get("What the model takes and gives", _ref("ModelMetadata"))},
        f"{base}/ready": {"get": _tensor_ready()},
        f"{base}/infer": {
            "post": {
                "operationId": f"inferTensors{suffix}",
                "summary": "Say what is to be seen in several videos (Open Inference Protocol)",
                "parameters": [length],
                "requestBody": {"required": True, "content": content},
                "responses": answers,
            }
        },
    }


def _schemas(model: LoadedModel) -> dict[str, Any]:
    text, number, numbers = (
        {"type": "string"},
        {"type": "number"},
        {"type": "array", "items": {"type": "number"}},
    )
    error = {"code": text, "message": text, "hint": text}
    extents = {"type": "array", "items": {"type": "integer"}}
    named = {"name": text, "datatype": text, "shape": extents}
    label: dict[str, Any] = {"enum": list(model.labels)} if model.labels else text
    rows = {"type": "array", "items": numbers}
    named_model = _object({"name": text, "version": text, "variant": text, "contract_hash": text})
    predictions = {"type": "array", "items": _object({"label": label, "score": number})}
    timings = _object({"decode_ms": number, "preprocess_ms": number, "infer_ms": number})
    window = _object({"start_seconds": number, "end_seconds": number, "predictions": predictions})
    return {
        "Options": _options(),
        "JsonBody": {
            **json_schema(JsonBody),
            "properties": {
                "video": {"type": "string", "contentEncoding": "base64"},
                "video_url": {"type": "string", "format": "uri"},
                "options": _ref("Options"),
            },
            "oneOf": [{"required": ["video"]}, {"required": ["video_url"]}],
        },
        "Timeline": _object(
            {
                "windows": {"type": "array", "items": window},
                "events": {"type": "array", "items": json_schema(Event)},
                "hop": {"type": "integer"},
                "video": json_schema(VideoInfo),
                "model": named_model,
            },
            timings=timings,
        ),
        "Answer": _object(
            {"video": json_schema(VideoInfo), "view_plan": json_schema(ViewPlan), "model": named_model},
            predictions=predictions,
            feature=numbers,
            inter=numbers,
            intra={"type": "array", "items": rows},
            clip_seconds=rows,
            timings=timings,
        ),
        "Error": _object(error),
        "Alive": _object({"status": {"const": "Healthy"}}),
        "Ready": _object({"status": {"const": "Ready"}}),
        "ServerMetadata": _object(
            {"name": text, "version": text, "extensions": {"type": "array", "items": text}}
        ),
        "ModelMetadata": _object(
            {
                "name": text,
                "versions": {"type": "array", "items": text},
                "platform": text,
                "inputs": {"type": "array", "items": _object(named)},
                "outputs": {"type": "array", "items": _object(named)},
            }
        ),
        "TensorLive": _object({"live": {"type": "boolean"}}),
        "TensorReady": _object({"ready": {"type": "boolean"}}, name=text),
        "TensorRequest": json_schema(JsonRequest),
        "TensorAnswer": _object(
            {
                "model_name": text,
                "model_version": text,
                "parameters": {"type": "object", "additionalProperties": text},
                "outputs": {"type": "array", "items": _object({**named, "data": {"type": "array"}})},
            },
            id=text,
        ),
        "TensorError": _object({"error": text, **error}, item={"type": "integer"}),
    }
