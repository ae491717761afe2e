"""OpenAPI descriptions of the request bodies that the routes parse themselves."""

from collections.abc import Mapping
from typing import Any

from models.tasks.base import Task
from service.gateway.entrance import NDJSON
from service.gateway.rest import examples
from service.parameters import FitParameters, HeadParameters, Parameters, task_parameters

_BINARY = {"type": "string", "format": "binary"}
_IMAGE: dict[str, Any] = {
    "oneOf": [
        {"type": "object", "properties": {"base64": {"type": "string"}}, "required": ["base64"]},
        {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]},
    ]
}


def task_description(task: Task) -> str:
    """The task's summary, and the media types that its route can return."""
    formats = [
        f"`Accept: {body.media_type}` returns "
        + ("the first result itself." if body.first_only else "all results in one body.")
        for body in task.bodies
    ]
    return " ".join(
        [
            task.summary,
            *formats,
            f"`Accept: {NDJSON}` returns a line for each input as it is ready.",
        ]
    )


def task_body(task: Task) -> dict[str, Any]:
    """The `openapi_extra` of a task's route."""
    parameters = task_parameters(task.name)
    if not task.modalities:
        return parameter_body(parameters, task.example)
    return image_body(parameters, task.example, videos="video" in task.modalities)


def image_body(
    parameters: type[Parameters], example: Mapping[str, Any], *, videos: bool = False
) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes images: query parameters and three kinds of body.

    Args:
        example: parameters of an example request.
        videos: whether it takes clips, too.
    """
    schema = parameters.model_json_schema()
    fields: dict[str, Any] = schema["properties"]
    required = schema.get("required", [])
    images = {"type": "array", "items": _IMAGE, "minItems": 1}
    form = {"image": {"type": "array", "items": _BINARY, "minItems": 1}, **fields}
    inputs = {"images": images}
    form_required, json_required = ["image", *required], ["images", *required]
    if videos:
        form["video"] = {"type": "array", "items": _BINARY}
        inputs["videos"] = {"type": "array", "items": _IMAGE["oneOf"][0]}
        form_required, json_required = required, required
    body = {
        # first, because /docs shows the first one, with its example
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {**inputs, **fields},
                "required": json_required,
            },
            "example": {"images": examples.IMAGES, **example},
        },
        "multipart/form-data": {
            "schema": {"type": "object", "properties": form, "required": form_required}
        },
        "image/*": {"schema": _BINARY},
        **({"video/*": {"schema": _BINARY}} if videos else {}),
    }
    return {
        "parameters": query_parameters(fields),
        "requestBody": {"required": True, "content": body},
    }


def query_parameters(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameters of the query, from the properties of a model's schema."""
    return [
        {
            "name": name,
            "in": "query",
            "schema": field,
            "description": field.get("description", ""),
        }
        for name, field in fields.items()
    ]


def parameter_body(parameters: type[Parameters], example: Mapping[str, Any]) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes parameters only."""
    schema = parameters.model_json_schema()
    body = {
        media: {
            "schema": {"type": "object", "properties": schema["properties"]},
            "example": dict(example),
        }
        for media in ("application/json", "application/x-www-form-urlencoded")
    }
    return {"requestBody": {"required": False, "content": body}}


def head_body() -> dict[str, Any]:
    """The `openapi_extra` of `POST /heads`."""
    shared = HeadParameters.model_json_schema()["properties"]
    options = FitParameters.model_json_schema()["properties"]
    labels = {"type": "array", "items": {"type": "string"}}
    labelled = {
        "type": "object",
        "properties": {"base64": {"type": "string"}, "label": {"type": "string"}},
        "required": ["base64", "label"],
    }
    parts = {
        "file": _BINARY,
        "archive": _BINARY,
        "adapter_config.json": _BINARY,
        "adapter_model.safetensors": _BINARY,
        "image": {"type": "array", "items": _BINARY},
        "label": labels,
        **shared,
        **options,
    }
    images = {"type": "array", "items": labelled}
    body = {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"images": images, **shared, **options},
                "required": ["images", "name", "trunk"],
            },
            "example": examples.FIT,
        },
        "multipart/form-data": {
            "schema": {"type": "object", "properties": parts, "required": ["name"]}
        },
        "application/octet-stream": {"schema": _BINARY},
        "application/zip": {"schema": _BINARY},
    }
    return {"requestBody": {"required": True, "content": body}}
