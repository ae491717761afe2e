"""OpenAPI descriptions of the collections' bodies."""

from typing import Any

from service.gateway.collections.bodies import (
    FORM,
    JSON,
)
from service.gateway.collections.parameters import (
    CollectionParameters,
    DeletionParameters,
    FolderParameters,
    ListParameters,
    QueryParameters,
)
from service.gateway.entrance import NDJSON
from service.gateway.rest.examples import PHOTO, json_body
from service.gateway.rest.openapi import query_parameters
from service.search.collection import MAX_THUMBNAIL

_BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
_METADATA: dict[str, Any] = {"type": "object", "additionalProperties": True}
_ENTRY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "base64": {"type": "string"},
        "url": {"type": "string"},
        "id": {"type": "string"},
        "metadata": _METADATA,
        "thumbnail": {
            "type": "string",
            "description": f"Base64 of a JPEG, PNG or WebP of at most {MAX_THUMBNAIL} bytes.",
        },
    },
}
_ENTRIES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "images": {"type": "array", "items": _ENTRY},
        **FolderParameters.model_json_schema()["properties"],
    },
}
_PARTS: dict[str, Any] = {
    "image": {"type": "array", "items": _BINARY},
    "id": {"type": "array", "items": {"type": "string"}},
    "metadata": {"type": "array", "items": {"type": "string"}},
}
_QUERY = QueryParameters.model_json_schema()


def _body(example: dict[str, Any], **schemas: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {media: {"schema": schema} for media, schema in schemas.items()}
    content[JSON]["example"] = example
    return {"requestBody": {"required": True, "content": content}}


CREATE = json_body({"model": "lite0-minilm"}, CollectionParameters.model_json_schema())
DELETE = json_body({"ids": ["coffee", "rocket"]}, DeletionParameters.model_json_schema())
LIST = {"parameters": query_parameters(ListParameters.model_json_schema()["properties"])}
ADD = _body(
    {"images": [{"base64": PHOTO, "id": "astronaut", "metadata": {"year": 1992}}]},
    **{
        JSON: _ENTRIES,
        FORM: {"type": "object", "properties": _PARTS},
        "image/*": _BINARY,
        NDJSON: _ENTRY,
    },
)
SEARCH = _body(
    {"text": "a person in space", "k": 3, "filter": {"year": 1992}},
    **{
        JSON: _QUERY,
        FORM: {
            "type": "object",
            "properties": {
                "image": _BINARY,
                "k": {"type": "integer"},
                "filter": {"type": "string"},
                "thumbnails": {"type": "boolean"},
            },
        },
        "image/*": _BINARY,
    },
)
