"""A task's named arrays for one image as the entry that clients read. Needs no torch."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


def answer_entry(task: str, arrays: Arrays, *, encoding: str = "float") -> dict[str, Any]:
    """One entry of `results`, as the contract words it.

    Args:
        task: `classify`, `embed` or `segment`.
        arrays: what that task's head returned for one image.
        encoding: for embeddings, `float` (a list) or `base64` (little-endian float32).
    """
    match task:
        case "classify":
            return {"predictions": _predictions(arrays)}
        case "embed":
            return {"embedding": encode_embedding(arrays["embedding"], encoding)}
        case "segment":
            return _segmentation(arrays)
    raise ValueError(f"no task {task!r}")


def encode_embedding(embedding: np.ndarray, encoding: str) -> list[float] | str:
    """A (D,) float32 vector as a list of floats, or as base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    vector: list[float] = embedding.tolist()
    return vector


def _predictions(arrays: Arrays) -> list[dict[str, Any]]:
    columns = (arrays["index"].tolist(), arrays["label"].tolist(), arrays["score"].tolist())
    return [
        {"index": index, "label": label, "score": score}
        for index, label, score in zip(*columns, strict=True)
    ]


def _segmentation(arrays: Arrays) -> dict[str, Any]:
    width, height = arrays["size"].tolist()
    columns = (arrays["index"].tolist(), arrays["label"].tolist(), arrays["pixels"].tolist())
    classes = [
        {"index": index, "label": label, "pixels": pixels}
        for index, label, pixels in zip(*columns, strict=True)
    ]
    mask: Any
    if "mask" in arrays:
        mask = arrays["mask"]
    elif "png" in arrays:
        mask = base64.b64encode(arrays["png"].tobytes()).decode()
    else:
        text = arrays["rle"] if "rle" in arrays else arrays["polygons"]
        mask = json.loads(text.tobytes())
    return {"width": width, "height": height, "classes": classes, "mask": mask}
