"""Example requests in the OpenAPI document. The demo catalog answers each of them."""

import base64
from pathlib import Path
from typing import Annotated, Any

from fastapi import Path as PathParameter

# models/inputs/astronaut.jpg, 64 pixels wide.
_PHOTO = Path(__file__).parents[1] / "assets" / "example.jpg"
PHOTO = base64.b64encode(_PHOTO.read_bytes()).decode()
# 8x8 pixels of one colour.
_COLOURS = {
    "red": "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEUlEQVR42mP8z4AdMDEMKQkAzUEBD7t4Nqo"
    "AAAAASUVORK5CYII=",
    "blue": "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mNkYPjPgA0wMeAAg1MCAMtDAQ9"
    "w2TiCAAAAAElFTkSuQmCC",
}

IMAGES = [{"base64": PHOTO}]
PREDICT: dict[str, Any] = {"models": ["stamps", "dinov2-focus-embed"]}
FIT: dict[str, Any] = {
    "name": "colours",
    "trunk": "efficientnet-lite0",
    "kind": "linear",
    "images": [
        {"base64": content, "label": label} for label, content in _COLOURS.items() for _ in range(3)
    ],
}
EMBEDDINGS: dict[str, Any] = {
    "model": "lite0-minilm",
    "input": ["a photo of an astronaut", f"data:image/jpeg;base64,{PHOTO}"],
}
OPEN_INFERENCE: dict[str, Any] = {
    "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [PHOTO]}],
    "outputs": [{"name": "label"}, {"name": "score"}],
}
INDEX: dict[str, Any] = {"ready": True}

ModelName = Annotated[str, PathParameter(examples=["efficientnet-lite0"])]
HeadName = Annotated[str, PathParameter(examples=[FIT["name"]])]
HeadPart = Annotated[str, PathParameter(examples=["report.json"])]


def json_body(example: dict[str, Any], schema: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes JSON alone."""
    media = {"schema": schema or {"type": "object"}, "example": example}
    return {"requestBody": {"required": True, "content": {"application/json": media}}}
