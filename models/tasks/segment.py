"""Segmentation: a mask of each image's own size."""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from models.tasks.base import NPY, PNG, Arrays, Body, Options, Output, Task
from models.tasks.rendering import first_of, image_size, npy, to_base64

MAX_LABELS = 1000
TEXT_OR_RING = re.compile(r'"(?:[^"\\]|\\.)*"|\[\[\d.*?\]\]')


class SegmentOptions(Options):
    output: Literal["png", "rle", "polygons", "overlay", "logits", "mask"] = Field(
        "png",
        description="png: base64 of an indexed PNG. rle: COCO run lengths. polygons: with holes. "
        "overlay: base64 of a PNG of the mask on the image. logits, mask: base64 of an .npy file "
        "of the logits or of the class indices.",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Two classes: foreground where its probability is above this (0.5). More "
        "classes: unlabelled where the best class has less than this probability (0).",
    )
    min_area: int | None = Field(
        None, ge=0, description="Regions of fewer pixels become background (0)."
    )
    labels: list[str] | None = Field(
        None, min_length=1, max_length=MAX_LABELS, description="For text-prompted models."
    )
    templates: list[str] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LABELS,
        description="As for /zero-shot; for text-prompted models.",
    )


def _render(arrays: Arrays) -> dict[str, Any]:
    columns = (arrays["index"].tolist(), arrays["label"].tolist(), arrays["pixels"].tolist())
    classes = [
        {"index": index, "label": label, "pixels": pixels}
        for index, label, pixels in zip(*columns, strict=True)
    ]
    return {**image_size(arrays), "classes": classes, "mask": _mask(arrays)}


def _mask(arrays: Arrays) -> Any:
    if "mask" in arrays:
        return to_base64(npy(arrays["mask"]))
    for name in ("png", "overlay", "logits"):
        if name in arrays:
            return to_base64(arrays[name])
    if "rle" in arrays:
        return json.loads(arrays["rle"].tobytes())
    return _polygons(arrays["polygons"].tobytes().decode())


def _polygons(text: str) -> Any:
    """What the JSON says. Its rings are parsed one by one: while one is, no other thread runs."""
    rings: list[Any] = []

    def number_of(piece: re.Match[str]) -> str:
        if piece[0].startswith('"'):
            return piece[0]
        rings.append(json.loads(piece[0]))
        return str(len(rings) - 1)

    def filled(polygons: list[list[int]]) -> list[Any]:
        return [[rings[number] for number in polygon] for polygon in polygons]

    outlines = json.loads(TEXT_OR_RING.sub(number_of, text))
    if any(isinstance(each, dict) for each in outlines):
        return [{**each, "polygons": filled(each["polygons"])} for each in outlines]
    return filled(outlines)  # of the foreground alone


def _line(entry: Mapping[str, Any]) -> str:
    total = entry["width"] * entry["height"]
    shares = [f"{c['label']} {c['pixels'] / total:.1%}" for c in entry["classes"]]
    return f"{entry['width']}x{entry['height']}: {', '.join(shares)}"


TASK = Task(
    name="segment",
    summary="Segment images: a mask of each image's own size.",
    options=SegmentOptions,
    outputs=(
        Output("size", "INT64", (-1, 2)),
        Output("index", "INT64", (-1, -1)),
        Output("label", "BYTES", (-1, -1)),
        Output("pixels", "INT64", (-1, -1)),
        Output("png", "BYTES", (-1,), form=True),
        Output("rle", "BYTES", (-1,), on_request=True, form=True),
        Output("polygons", "BYTES", (-1,), on_request=True, form=True),
        Output("mask", "UINT8", (-1, -1, -1), on_request=True, form=True),
        Output("overlay", "BYTES", (-1,), on_request=True, form=True),
        Output("logits", "BYTES", (-1,), on_request=True, form=True),
    ),
    render=_render,
    line=_line,
    example={"output": "rle"},
    bodies=(Body(PNG, first_of("png", "overlay")), Body(NPY, first_of("logits"))),
)
